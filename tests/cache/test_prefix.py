"""The prefix tree against a plain list of known prefixes, searched from end to end."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvant.cache.blocks import BlockPool, Paging
from kvant.cache.prefix import Match, PrefixTree

SIZE = 4
Tokens = tuple[int, ...]


def common(first: Tokens, second: Tokens) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


@dataclass
class Known:
    """One block's worth: the whole text up to its end, and when it was last used."""

    salt: int | None
    text: Tokens
    block: int
    parent: Tokens
    used: int = 0


class NaiveTree:
    """What `PrefixTree` promises, slowly."""

    def __init__(self, lead: int) -> None:
        self.known: list[Known] = []
        self.clock = 0
        self.lead = lead

    def pieces(self, length: int) -> list[tuple[int, int]]:
        """The spans of tokens that lie in one block each: the first block has room for `lead` tokens less."""
        return list(pairwise([0, *range(SIZE - self.lead, length, SIZE), length])) if length else []

    def insert(self, text: Tokens, blocks: list[int], salt: int | None) -> list[set[int]]:
        kept = []
        for (start, end), block in zip(self.pieces(len(text)), blocks, strict=True):
            piece = text[:end]
            siblings = [k for k in self.known if k.salt == salt and k.parent == text[:start]]
            same = [k for k in siblings if k.text[: len(piece)] == piece]
            if not same:
                self.known = [k for k in self.known if k not in siblings or piece[: len(k.text)] != k.text]
                same = [Known(salt, piece, block, text[:start])]
                self.known += same
            kept.append({k.block for k in same})
        return kept

    def match(self, text: Tokens, salt: int | None) -> tuple[int, list[set[int]]]:
        """The length of the longest known prefix, and for each of its blocks those that may stand for it."""
        mine = [k for k in self.known if k.salt == salt]
        length = max((common(k.text, text) for k in mine), default=0)
        return length, [
            {k.block for k in mine if len(k.parent) == start and common(k.text, text) >= end}
            for start, end in self.pieces(length)
        ]

    def use(self, blocks: list[int]) -> None:
        """A path was just used; in it, an end counts as used before what it hangs on."""
        for block in reversed(blocks):
            self.clock += 1
            next(k for k in self.known if k.block == block).used = self.clock

    def next_to_go(self, pool: BlockPool) -> Known | None:
        parents = {(k.salt, k.parent) for k in self.known}
        ends = [k for k in self.known if (k.salt, k.text) not in parents and pool.references(k.block) == 1]
        return min(ends, key=lambda k: k.used, default=None)


TEXTS = st.lists(st.sampled_from((0, 0, 0, 1)), min_size=1, max_size=14).map(tuple)
MOVES = st.lists(
    st.tuples(
        st.sampled_from(("insert", "insert", "match", "hold", "let go", "evict", "evict")),
        TEXTS,
        st.sampled_from((None, 1)),
    ),
    min_size=5,
    max_size=60,
)


@pytest.mark.parametrize("lead", range(SIZE))
@settings(max_examples=100)
@given(moves=MOVES)
def test_it_knows_finds_and_forgets_what_it_should(lead, moves):
    pool = BlockPool(400)
    tree, naive = PrefixTree(pool, Paging(SIZE, lead)), NaiveTree(lead)
    held: list[int] = []
    for move, text, salt in moves:
        if move == "insert":
            insert(pool, tree, naive, text, salt)
        elif move in ("match", "hold"):
            found = match(tree, naive, text, salt)
            for block in found.blocks if move == "hold" else ():
                pool.share(block)
                held.append(block)
        elif move == "let go" and held:
            pool.release(held.pop())
        elif move == "evict":
            evict(pool, tree, naive)
        assert sorted(tree.blocks()) == sorted(k.block for k in naive.known)
        assert len(tree) == len(naive.known)
        assert 400 - pool.num_free == len({*held, *tree.blocks()})
    tree.clear()
    assert len(tree) == 0
    assert 400 - pool.num_free == len(set(held))


def insert(pool: BlockPool, tree: PrefixTree, naive: NaiveTree, text: Tokens, salt: int | None) -> None:
    """As a sequence does it that has computed the whole text in blocks of its own: one half first, then the rest."""
    blocks = [pool.take() for _ in naive.pieces(len(text))]
    paging = Paging(SIZE, naive.lead)
    half = paging.full_blocks(len(text)) // 2
    known = tree.insert(text[: paging.capacity(half)], blocks[:half], salt)
    kept = known + tree.insert(text[paging.capacity(half) :], blocks[half:], salt, known)
    for block, allowed in zip(kept, naive.insert(text, blocks, salt), strict=True):
        assert block in allowed
    naive.use(kept)
    for block in blocks:
        pool.release(block)


def match(tree: PrefixTree, naive: NaiveTree, text: Tokens, salt: int | None) -> Match:
    found = tree.match(text, salt)
    length, allowed = naive.match(text, salt)
    assert found.length == length
    for block, candidates in zip(found.blocks, allowed, strict=True):
        assert block in candidates
    naive.use(list(found.blocks))
    return found


def evict(pool: BlockPool, tree: PrefixTree, naive: NaiveTree) -> None:
    gone = naive.next_to_go(pool)
    assert tree.evict() == (gone is not None)
    if gone is not None:
        naive.known.remove(gone)
        assert pool.references(gone.block) == 0


def known(pool: BlockPool, tree: PrefixTree, text: list[int]) -> list[int]:
    """Insert a text from blocks that nobody else holds afterwards; gives the tree's blocks."""
    blocks = [pool.take() for _ in range(0, len(text), SIZE)]
    kept = tree.insert(text, blocks)
    for block in blocks:
        pool.release(block)
    return kept


def test_the_least_recently_used_end_goes_first_and_a_beginning_after_all_its_ends():
    pool = BlockPool(10)
    tree = PrefixTree(pool, Paging(SIZE))
    start, first = known(pool, tree, [1] * 8)
    _, second = known(pool, tree, [1] * 4 + [2] * 4)
    [other] = known(pool, tree, [3] * 3)
    tree.match([1] * 8)
    gone = []
    while tree.evict():
        gone += [b for b in (start, first, second, other) if pool.references(b) == 0 and b not in gone]
    assert gone == [second, other, first, start]
    assert pool.num_free == 10


def test_the_first_block_holds_less_where_a_lead_takes_its_slots():
    pool = BlockPool(9)
    tree = PrefixTree(pool, Paging(SIZE, lead=3))
    blocks = [pool.take() for _ in range(3)]
    tree.insert([5, 6, 7, 8, 9, 10, 11], blocks)
    found = [tree.match([5, 6, 7, 8, 9, 10, 11][:length]) for length in range(8)]
    assert [len(match.blocks) for match in found] == [0, 1, 2, 2, 2, 2, 3, 3]
    assert [match.length for match in found] == list(range(8))
    assert all(match.blocks == tuple(blocks[: len(match.blocks)]) for match in found)


def test_what_is_inserted_again_was_used_again():
    pool = BlockPool(6)
    tree = PrefixTree(pool, Paging(SIZE))
    for start in (1, 2, 1):
        known(pool, tree, [start] * 8)
    tree.evict()
    assert [tree.match([start] * 8).length for start in (1, 2)] == [8, 4]


def test_what_somebody_holds_stays():
    pool = BlockPool(4)
    tree = PrefixTree(pool, Paging(SIZE))
    blocks = known(pool, tree, [1] * 6)
    pool.share(blocks[1])
    assert not tree.evict()
    pool.release(blocks[1])
    assert tree.evict()
    assert tree.match([1] * 6).length == 4


def test_a_longer_text_replaces_the_partly_filled_end_it_continues():
    pool = BlockPool(9)
    tree = PrefixTree(pool, Paging(SIZE))
    known(pool, tree, [1] * 6)
    known(pool, tree, [1] * 7)
    assert len(tree) == 2
    known(pool, tree, [1] * 5)
    assert (len(tree), tree.match([1] * 9).length) == (2, 7)
    known(pool, tree, [1] * 12)
    assert (len(tree), tree.match([1] * 9).length) == (3, 9)
    assert pool.num_free == 6


def test_many_texts_of_one_beginning_are_found_quickly():
    """Looking a text up takes steps for its own blocks, not for all that is known."""
    pool = BlockPool(3000)
    tree = PrefixTree(pool, Paging(SIZE))
    for i in range(2000):
        known(pool, tree, [0, i % 50, i // 50])
    for i in range(0, 2000, 97):
        assert tree.match([0, i % 50, i // 50, 1]).length == 3
        assert tree.match([0, i % 50, 77]).length == 2
