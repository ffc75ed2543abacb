"""The pool's memory: what is allocated, what is copied, and how its size is chosen."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvant.cache.store import KVStore, MemoryReport, fit_pool
from kvant.config import EngineConfig
from kvant.errors import MemoryFitError
from kvant.formats.kv import KV_FORMATS, KVPlan, KVShape

SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_dim=64)
INT4 = KVPlan.uniform(KV_FORMATS["int4"], 3)
MIB = 2**20


def block_bytes(block_size: int = 16, shape: KVShape = SHAPE) -> int:
    """A block of int4 by hand: per token, head and layer a key and a value of 4 bits an element, scale and zero."""
    return block_size * shape.num_layers * shape.num_kv_heads * 2 * (shape.head_dim // 2 + 4)


@pytest.mark.parametrize("name", KV_FORMATS)
@given(
    shape=st.builds(KVShape, st.integers(1, 3), st.integers(1, 3), st.sampled_from((16, 64, 80))),
    blocks=st.integers(1, 4),
    block_size=st.sampled_from((8, 16)),
)
def test_the_reported_bytes_are_those_allocated(name, shape, blocks, block_size):
    plan = KVPlan.uniform(KV_FORMATS[name], shape.num_layers)
    store = KVStore.allocate(shape, plan, blocks, block_size)
    report = MemoryReport(shape, plan, blocks, block_size)
    allocated = sum(plane.nbytes for layer in store.layers for plane in layer.planes.values())
    assert report.pool_bytes == allocated == report.tokens * report.bytes_per_token
    assert len(store.layers) == shape.num_layers
    for layer in store.layers:
        assert all(p.shape[:3] == (blocks, shape.num_kv_heads, block_size) for p in layer.planes.values())
        assert not any(plane.any() for plane in layer.planes.values())


def test_layers_share_no_memory():
    store = KVStore.allocate(SHAPE, INT4, 2, 8)
    starts = [plane.data_ptr() for layer in store.layers for plane in layer.planes.values()]
    assert len(set(starts)) == 3 * 4


@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_blocks_are_copied_whole_and_in_order(name):
    store = KVStore.allocate(SHAPE, KVPlan.uniform(KV_FORMATS[name], 3), 4, 8)
    planes = [plane for layer in store.layers for plane in layer.planes.values()]
    for plane in planes:
        plane.copy_(torch.arange(4).view(4, *[1] * (plane.dim() - 1)).expand_as(plane))
    store.copy_blocks([(0, 1), (1, 2)])
    assert all(plane.flatten(1).unique(dim=1).squeeze(1).tolist() == [0, 0, 0, 3] for plane in planes)


def test_memory_that_the_system_refuses_is_a_clear_error():
    with pytest.raises(MemoryFitError, match=r"refused .* MiB .*kv_cache_memory"):
        KVStore.allocate(SHAPE, INT4, 2**45, 16)


def test_the_report_counts_in_other_formats_too():
    report = MemoryReport(SHAPE, INT4, num_blocks=100, block_size=16)
    assert report.bytes_per_token == 3 * 2 * 2 * 36
    assert report.tokens == report.tokens_in("int4") == 1600
    for name, vector in (("fp32", 256), ("fp16", 128), ("bf16", 128), ("int8", 68)):
        assert report.tokens_in(name) == report.pool_bytes // (12 * vector * 16) * 16
    text = report.describe()
    assert "int4" in text
    assert "432 bytes per token" in text
    assert "1,600 tokens" in text
    assert f"{1600 / 448:.2f}x" in text
    assert MemoryReport(SHAPE, INT4, 1, 8).describe(), "a pool too small for 16 bit is described too"


def fit(free: int = 1000 * MIB, max_position: int = 2048, **config: object) -> MemoryReport:
    return fit_pool(EngineConfig(block_size=16, **config), SHAPE, INT4, max_position, free)


def test_the_pool_has_as_many_blocks_as_are_asked_for():
    assert fit(num_kv_blocks=77).num_blocks == 77


@given(budget=st.integers(block_bytes(), 900 * MIB))
def test_the_pool_fills_the_bytes_it_is_given(budget):
    report = fit(kv_cache_memory=budget)
    assert report.pool_bytes <= budget < report.pool_bytes + block_bytes()


@given(fraction=st.floats(0.001, 1.0), free=st.integers(10 * MIB, 100_000 * MIB))
def test_the_pool_takes_its_fraction_of_what_is_free(fraction, free):
    report = fit(free, kv_cache_memory=fraction)
    assert report.pool_bytes <= free * fraction < report.pool_bytes + block_bytes() + 1


def test_sizes_may_be_written_out():
    assert fit(kv_cache_memory="100MiB") == fit(kv_cache_memory=100 * MIB)
    assert fit(kv_cache_memory="25%") == fit(kv_cache_memory=0.25)


def test_left_alone_it_is_half_of_the_free_memory():
    report = fit(10 * MIB)
    assert report.pool_bytes <= 5 * MIB < report.pool_bytes + block_bytes()


@given(seqs=st.integers(1, 64), longest=st.none() | st.integers(1, 4000), max_position=st.integers(1, 4000))
def test_left_alone_it_takes_no_more_than_can_be_used(seqs, longest, max_position):
    report = fit(10**12, max_position, max_num_seqs=seqs, max_model_len=longest)
    assert report.num_blocks == seqs * -(-(longest or max_position) // 16)


def test_more_than_is_free_is_refused():
    for asked in ({"num_kv_blocks": 100}, {"kv_cache_memory": 100 * block_bytes()}):
        assert fit(100 * block_bytes(), **asked).num_blocks == 100
        with pytest.raises(MemoryFitError, match=r"100 KV blocks need \d+ MiB, \d+ MiB are free; lower"):
            fit(100 * block_bytes() - 1, **asked)


def test_not_even_one_block():
    for asked in ({"kv_cache_memory": block_bytes() - 1}, {}):
        with pytest.raises(MemoryFitError, match=r"does not hold one block of 16 tokens; raise kv_cache_memory"):
            fit(block_bytes() + 5, **asked)


def test_one_sequence_of_the_asked_length_must_fit():
    assert fit(num_kv_blocks=10, max_model_len=160).tokens == 160
    for asked in ({"num_kv_blocks": 10}, {"kv_cache_memory": 10 * block_bytes()}):
        with pytest.raises(MemoryFitError, match=r"max_model_len=161 needs .* hold 160 tokens; .*lower max_model_len"):
            fit(max_model_len=161, **asked)
    with pytest.raises(MemoryFitError, match="max_model_len=100000"):
        fit(2 * MIB, max_model_len=100_000)
    assert fit(num_kv_blocks=1, max_position=2048).tokens == 16, "without a wish, what fits is the limit"
