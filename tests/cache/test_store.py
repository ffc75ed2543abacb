"""The pool's memory: what is allocated, what is copied, and how its size is chosen."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvant.cache.store import KVStore, MemoryReport, fit_pool
from kvant.config import EngineConfig
from kvant.errors import ConfigError, MemoryFitError
from kvant.formats.kv import KV_FORMATS, KVFormat, KVPlan, KVShape, LayerPlan
from kvant.formats.kv_codecs import AffineCodec

SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_dim=64)
INT4 = KVPlan.uniform(KVFormat("four-bit", AffineCodec(4), AffineCodec(4), ""), 3)
SINKS = KVPlan.uniform(KVFormat("four-bit-sinks", AffineCodec(4), AffineCodec(4), "", sinks=4), 3)
SINK_SLOTS, LEAD = 16, 12  # what four tokens of 16 bit take in slots of 4 bit, and how many of these are no token's own
MIB = 2**20


def block_bytes(block_size: int = 16, shape: KVShape = SHAPE) -> int:
    """A block of int4 by hand: per token, head and layer a key and a value of 4 bits an element, scale and zero."""
    return block_size * shape.num_layers * shape.num_kv_heads * 2 * (shape.head_dim // 2 + 4)


@pytest.mark.parametrize("fmt", [*KV_FORMATS.values(), SINKS.layers[0].format], ids=lambda fmt: fmt.name)
@given(
    shape=st.builds(KVShape, st.integers(1, 3), st.integers(1, 3), st.sampled_from((16, 64, 80))),
    blocks=st.integers(1, 4),
    block_size=st.sampled_from((16, 32)),
)
def test_the_reported_bytes_are_those_allocated(fmt, shape, blocks, block_size):
    plan = KVPlan.uniform(fmt, shape.num_layers)
    store = KVStore.allocate(shape, plan, blocks, block_size)
    report = MemoryReport(shape, plan, blocks, block_size)
    allocated = sum(plane.nbytes for layer in store.layers for plane in layer.planes.values())
    assert report.pool_bytes == allocated == (report.tokens + fmt.lead) * report.bytes_per_token
    assert store.paging == report.paging
    assert len(store.layers) == shape.num_layers
    for layer in store.layers:
        assert all(p.shape[:3] == (blocks, shape.num_kv_heads, block_size) for p in layer.planes.values())
        assert not any(plane.any() for plane in layer.planes.values())


def test_layers_share_no_memory():
    store = KVStore.allocate(SHAPE, INT4, 2, 8)
    starts = [plane.data_ptr() for layer in store.layers for plane in layer.planes.values()]
    assert len(set(starts)) == 3 * 4


@pytest.mark.parametrize("plan", [KVPlan.uniform(KV_FORMATS["fp32"], 3), INT4], ids=lambda plan: plan.name)
def test_blocks_are_copied_whole_and_in_order(plan):
    store = KVStore.allocate(SHAPE, plan, 4, 8)
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
    assert report.tokens == 1600
    for name, vector in (("fp32", 256), ("fp16", 128), ("bf16", 128)):
        assert report.tokens_in(name) == report.pool_bytes // (12 * vector * 16) * 16
    for name, fmt in KV_FORMATS.items():
        blocks = report.pool_bytes // (16 * fmt.bytes_per_token(SHAPE))
        assert report.tokens_in(name) == 16 * blocks - fmt.lead
    text = report.describe()
    assert "four-bit" in text
    assert "432 bytes per token" in text
    assert "1,600 tokens" in text
    assert f"{1600 / 448:.2f}x" in text
    assert MemoryReport(SHAPE, INT4, 1, 8).describe(), "a pool too small for 16 bit is described too"


def test_sinks_cost_the_report_their_lead_once(monkeypatch):
    report = MemoryReport(SHAPE, SINKS, num_blocks=100, block_size=16)
    assert report.bytes_per_token == 3 * 2 * 2 * 36, "per token it is what the codes take"
    assert report.tokens == 1600 - LEAD
    assert report.tokens_in("fp16") == MemoryReport(SHAPE, INT4, 100, 16).tokens_in("fp16") == 448
    assert "hold 1,588 tokens" in report.describe()
    assert f"{1588 / 448:.2f}x" in report.describe()
    monkeypatch.setitem(KV_FORMATS, "four-bit-sinks", SINKS.layers[0].format)
    assert report.tokens_in("four-bit-sinks") == 1588
    wide = MemoryReport(SHAPE, KVPlan.uniform(KV_FORMATS["fp16"], 3), num_blocks=3, block_size=16)
    assert wide.tokens_in("four-bit-sinks") == 3 * 16 * 128 // (16 * 36) * 16 - LEAD


def test_one_layer_with_sinks_costs_all_layers_the_lead():
    mixed = KVPlan("mixed", (LayerPlan(KV_FORMATS["fp16"]), SINKS.layers[0], INT4.layers[0]))
    report = MemoryReport(SHAPE, mixed, num_blocks=5, block_size=16)
    assert report.bytes_per_token == 2 * 2 * (128 + 36 + 36)
    assert (report.paging.lead, report.tokens) == (LEAD, 80 - LEAD)


def fit(free: int = 1000 * MIB, max_position: int = 2048, plan: KVPlan = INT4, **config: object) -> MemoryReport:
    return fit_pool(EngineConfig(**({"block_size": 16} | config)), SHAPE, plan, max_position, free)


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


def test_sinks_leave_a_sequence_less_room_in_its_first_block():
    for length in (1, 4, 5, 147, 148):
        blocks = -(-(length + LEAD) // 16)
        assert fit(plan=SINKS, num_kv_blocks=blocks, max_model_len=length).tokens == 16 * blocks - LEAD >= length
        assert fit(plan=SINKS, max_num_seqs=3, max_model_len=length).num_blocks == 3 * blocks
    for asked in ({"num_kv_blocks": 10}, {"kv_cache_memory": 10 * block_bytes()}):
        with pytest.raises(MemoryFitError, match=r"max_model_len=149 needs .* hold 148 tokens; .*lower max_model_len"):
            fit(plan=SINKS, max_model_len=149, **asked)


def test_the_memory_that_a_length_needs_is_that_of_its_blocks():
    """Here a block takes 1 MiB, and two hold 20 tokens beside the lead."""
    shape = KVShape(num_layers=32, num_kv_heads=32, head_dim=56)
    plan = KVPlan.uniform(SINKS.layers[0].format, 32)
    config = EngineConfig(block_size=16, num_kv_blocks=2, max_model_len=21)
    with pytest.raises(MemoryFitError, match="max_model_len=21 needs 3 MiB of KV cache, 2 MiB hold 20 tokens"):
        fit_pool(config, shape, plan, 2048, 1000 * MIB)


def test_a_block_must_hold_all_sinks():
    mixed = KVPlan("mixed", (LayerPlan(KV_FORMATS["fp16"]), *SINKS.layers[:2]))
    for plan in (SINKS, mixed):
        message = f"block_size=8 is too small for kv_cache_dtype='{plan.name}': .* 4 tokens.* use block_size=16 or more"
        with pytest.raises(ConfigError, match=message):
            fit(plan=plan, block_size=8)
        assert fit(plan=plan, block_size=SINK_SLOTS, num_kv_blocks=1).tokens == 4
    five = KVPlan.uniform(KVFormat("five", AffineCodec(4), AffineCodec(4), "", sinks=5), 3)
    with pytest.raises(ConfigError, match="block_size=16 is too small .* 20 slots .* use block_size=32 or more"):
        fit(plan=five)
