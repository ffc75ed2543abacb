"""The block pool against a count of who holds what, and paging against slots laid out one by one."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvant.cache.blocks import BlockPool, Paging

MOVES = st.sampled_from(["take", "share", "release", "keep", "forget"])


@given(size=st.integers(0, 6), moves=st.lists(st.tuples(MOVES, st.integers(0, 5))))
def test_a_block_is_free_exactly_while_nobody_holds_or_keeps_it(size, moves):
    pool, held, kept = BlockPool(size), Counter(), set()
    for move, block in moves:
        if move == "take":
            taken = pool.take()
            assert (taken is None) == (len(kept | set(+held)) == size)
            if taken is not None:
                assert held[taken] == 0
                held[taken] = 1
        elif move == "forget" and block in kept:
            pool.forget(block)
            kept.remove(block)
        elif move == "keep" and held[block] and block not in kept:
            pool.keep(block)
            kept.add(block)
        elif (move == "share" and (held[block] or block in kept)) or (move == "release" and held[block]):
            (pool.share if move == "share" else pool.release)(block)
            held[block] += 1 if move == "share" else -1
        assert pool.num_free == size - len(kept | set(+held))
        assert pool.num_used == len(+held)
        assert [pool.references(i) for i in range(size)] == [held[i] + (i in kept) for i in range(size)]


def test_a_free_block_is_neither_shared_nor_released():
    pool = BlockPool(2)
    block = pool.take()
    pool.release(block)
    with pytest.raises(ValueError, match=f"block {block} is free and cannot be shared"):
        pool.share(block)
    with pytest.raises(ValueError, match=f"block {block} is free already"):
        pool.release(block)
    assert pool.num_free == 2


PAGINGS = st.integers(1, 20).flatmap(lambda size: st.builds(Paging, st.just(size), st.integers(0, size - 1)))


def laid_out(paging: Paging, tokens: int) -> list[list[int | None]]:
    """Which token each slot of a sequence's blocks belongs to, block by block; None is the lead."""
    slots = [*[None] * paging.lead, *range(tokens)] if tokens else []
    return [slots[start : start + paging.block_size] for start in range(0, len(slots), paging.block_size)]


@given(paging=PAGINGS, tokens=st.integers(0, 100))
def test_paging_is_what_laying_tokens_out_one_by_one_gives(paging, tokens):
    blocks = laid_out(paging, tokens)
    assert paging.blocks_for(tokens) == len(blocks)
    assert paging.full_blocks(tokens) == sum(len(block) == paging.block_size for block in blocks)
    for index, block in enumerate(blocks):
        assert all(paging.block_of(token) == index for token in block if token is not None)


@given(paging=PAGINGS, blocks=st.integers(0, 6))
def test_so_many_blocks_hold_the_tokens_that_lie_in_them(paging, blocks):
    first = laid_out(paging, tokens=200)[:blocks]
    assert paging.capacity(blocks) == sum(token is not None for block in first for token in block)
