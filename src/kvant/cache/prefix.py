"""The prefix tree: which blocks hold the KV of which token prefix, and which of them may be evicted.

A node is one block's tokens below its parent's; the path from a root spells a prefix. The last node of a path may be
partly filled. The tree holds one reference to each of its blocks. A lookup may end in the middle of a block: since
codes are append-only, its first tokens are valid for anyone who copies the block before writing on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from kvant.cache.blocks import BlockPool, Paging

Tokens = tuple[int, ...]


@dataclass(eq=False)
class _Node:
    tokens: Tokens
    block: int
    parent: _Node | None
    children: dict[Tokens, _Node] = field(default_factory=dict)
    order: list[Tokens] = field(default_factory=list)  # the children's keys, sorted


@dataclass(frozen=True)
class Match:
    """The longest known prefix of a text: its blocks, and how many tokens they hold of it."""

    blocks: tuple[int, ...]
    length: int


class PrefixTree:
    """Known prefixes over a pool of blocks. `salt` separates texts whose equal tokens have different KV."""

    def __init__(self, pool: BlockPool, paging: Paging) -> None:
        self._pool = pool
        self._paging = paging
        self._roots: dict[Hashable, _Node] = {}
        self._nodes: dict[int, _Node] = {}  # by block
        # Least recently used first; a child always comes before its parent.
        self._recent: OrderedDict[_Node, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._recent)

    def match(self, tokens: Sequence[int], salt: Hashable = None) -> Match:
        """The longest prefix of `tokens` in the tree. The caller shares the blocks it wants to keep."""
        node: _Node | None = self._roots.get(salt)
        deepest = node
        blocks: list[int] = []
        length = 0
        while node is not None and length < len(tokens):
            end = self._paging.capacity(len(blocks) + 1)
            child, common = _closest_child(node, tuple(tokens[length:end]))
            if child is None:
                break
            blocks.append(child.block)
            length += common
            deepest = child
            node = child if length == end else None
        self._touch(deepest)
        return Match(tuple(blocks), length)

    def insert(
        self, tokens: Sequence[int], blocks: Sequence[int], salt: Hashable = None, known: Sequence[int] = ()
    ) -> list[int]:
        """Make a prefix known: `blocks` hold the KV of `tokens`, the last one perhaps partly.

        They go on after `known`, full blocks as the tree has them, which the caller holds: no token of these is looked
        at again.

        Where the tree knows a block of equal content already, it keeps its own. Returns the blocks that now stand for
        the prefix, in order; the caller's references are unchanged.
        """
        node = self._nodes[known[-1]] if known else self._roots.setdefault(salt, _Node((), -1, None))
        kept: list[int] = []
        first = self._paging.capacity(len(known))
        for index, block in enumerate(blocks, len(known)):
            piece = tuple(tokens[self._paging.capacity(index) - first : self._paging.capacity(index + 1) - first])
            child, common = _closest_child(node, piece)
            if child is None or common < len(piece):
                child = self._add(node, piece, block)
            kept.append(child.block)
            node = child
        self._touch(node)
        return kept

    def evict(self) -> bool:
        """Forget the least recently used prefix end that nobody uses, freeing its block; False if there is none."""
        for node in self._recent:
            if not node.children and self._pool.references(node.block) == 1:
                self._remove(node)
                return True
        return False

    def clear(self) -> None:
        """Forget everything."""
        while self._recent:
            for node in list(self._recent):
                if not node.children:
                    self._remove(node)

    def blocks(self) -> Iterator[int]:
        """The blocks of all known prefixes."""
        return (node.block for node in self._recent)

    def _add(self, parent: _Node, piece: Tokens, block: int) -> _Node:
        self._drop_shorter(parent, piece)
        node = _Node(piece, block, parent)
        parent.children[piece] = node
        insort(parent.order, piece)
        self._pool.keep(block)
        self._recent[node] = None
        self._nodes[block] = node
        return node

    def _drop_shorter(self, parent: _Node, piece: Tokens) -> None:
        """A partly filled sibling that this piece continues adds nothing any more."""
        at = bisect_left(parent.order, piece)
        shorter = parent.order[at - 1] if at else ()
        if shorter and piece[: len(shorter)] == shorter:
            self._remove(parent.children[shorter])

    def _remove(self, node: _Node) -> None:
        assert node.parent is not None, "roots hold no block"
        del node.parent.children[node.tokens]
        del node.parent.order[bisect_left(node.parent.order, node.tokens)]
        del self._recent[node], self._nodes[node.block]
        self._pool.forget(node.block)

    def _touch(self, node: _Node | None) -> None:
        """Mark a path as just used, its end first."""
        while node is not None and node.parent is not None:
            self._recent.move_to_end(node)
            node = node.parent


def _closest_child(node: _Node, piece: Tokens) -> tuple[_Node | None, int]:
    """The child that shares the most first tokens with `piece`, and how many.

    Among sorted keys it is a neighbour of where `piece` would stand.
    """
    if piece in node.children:
        return node.children[piece], len(piece)
    at = bisect_left(node.order, piece)
    neighbours = node.order[max(at - 1, 0) : at + 1]
    best = max(neighbours, key=lambda key: _common(key, piece), default=())
    common = _common(best, piece)
    return (node.children[best], common) if common else (None, 0)


def _common(first: Tokens, second: Tokens) -> int:
    """Length of the common prefix."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
