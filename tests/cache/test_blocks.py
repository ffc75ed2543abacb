"""The block pool against a count of who holds what."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvant.cache.blocks import BlockPool


@given(
    size=st.integers(0, 6), moves=st.lists(st.tuples(st.sampled_from(["take", "share", "release"]), st.integers(0, 5)))
)
def test_a_block_is_free_exactly_while_nobody_holds_it(size, moves):
    pool, held = BlockPool(size), Counter()
    for move, block in moves:
        if move == "take":
            taken = pool.take()
            assert (taken is None) == ((held.total() > 0 and len(+held) == size) or size == 0)
            if taken is not None:
                assert held[taken] == 0
                held[taken] = 1
        elif block < size and held[block]:
            (pool.share if move == "share" else pool.release)(block)
            held[block] += 1 if move == "share" else -1
        assert pool.num_free == size - len(+held)
        assert [pool.references(i) for i in range(size)] == [held[i] for i in range(size)]


def test_a_free_block_is_neither_shared_nor_released():
    pool = BlockPool(2)
    block = pool.take()
    pool.release(block)
    with pytest.raises(ValueError, match=f"block {block} is free and cannot be shared"):
        pool.share(block)
    with pytest.raises(ValueError, match=f"block {block} is free already"):
        pool.release(block)
    assert pool.num_free == 2
