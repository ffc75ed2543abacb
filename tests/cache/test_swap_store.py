"""Swap space: whole blocks leave the store and come back bit for bit, and its size fits beside the pool."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from kvant.cache.store import KVStore, MemoryReport, SwapSpace, fit_pool
from kvant.config import EngineConfig
from kvant.errors import MemoryFitError
from kvant.formats.kv import KV_FORMATS, KVPlan, KVShape, LayerPlan

SHAPE = KVShape(num_layers=2, num_kv_heads=2, head_dim=64)
FP32 = KVPlan.uniform(KV_FORMATS["fp32"], 2)
MIXED = KVPlan("mixed", (LayerPlan(KV_FORMATS["fp16"]), LayerPlan(KV_FORMATS["int4_plain"])))
BLOCK = 16 * 2 * 2 * 2 * 64 * 4  # a block of float32 by hand: tokens, layers, heads, key and value, elements, bytes
NUM_BLOCKS = 9


def store_of_noise(plan: KVPlan, num_blocks: int = NUM_BLOCKS) -> KVStore:
    """Random bytes, so that floats are NaN, infinite and denormal too."""
    store = KVStore.allocate(SHAPE, plan, num_blocks, 16)
    for plane in planes_of(store):
        raw = plane.view(torch.uint8)
        raw.copy_(torch.randint(0, 256, raw.shape, generator=torch.Generator().manual_seed(3)))
    return store


def planes_of(store: KVStore) -> list[torch.Tensor]:
    return [plane for layer in store.layers for plane in layer.planes.values()]


def contents(store: KVStore) -> list[torch.Tensor]:
    """By block: all its bytes."""
    flat = [plane.view(torch.uint8).flatten(1) for plane in planes_of(store)]
    return list(torch.cat(flat, dim=1).clone())


@pytest.mark.parametrize("plan", [*(KVPlan.uniform(f, 2) for f in KV_FORMATS.values()), MIXED], ids=lambda p: p.name)
def test_blocks_come_back_bit_for_bit_wherever_they_are_put(plan):
    store = store_of_noise(plan)
    before = contents(store)
    swap = SwapSpace(store, 3)
    swap.swap_out([(7, 2), (0, 0), (4, 1)])
    assert all(torch.equal(now, was) for now, was in zip(contents(store), before, strict=True))
    for plane in planes_of(store):
        plane.zero_()
    swap.swap_in([(1, 8), (2, 3), (0, 5)])
    after = contents(store)
    expected = {8: before[4], 3: before[7], 5: before[0]}
    assert all(torch.equal(after[block], expected.get(block, torch.zeros_like(before[0]))) for block in range(9))


@given(data=st.data())
def test_any_moves_are_made_as_a_plan_lists_them(data):
    store = store_of_noise(MIXED)
    swap, kept = SwapSpace(store, 5), {}
    for _ in range(3):
        out = [(data.draw(blocks()), place) for place in data.draw(st.lists(st.integers(0, 4), unique=True))]
        before = contents(store)
        swap.swap_out(out)
        kept |= {place: before[block] for block, place in out}
        if kept:
            targets = data.draw(st.lists(blocks(), unique=True))
            back = [(data.draw(st.sampled_from(sorted(kept))), block) for block in targets]
            swap.swap_in(back)
            for place, block in back:
                before[block] = kept[place]
        assert all(torch.equal(now, meant) for now, meant in zip(contents(store), before, strict=True))


def blocks() -> st.SearchStrategy[int]:
    return st.integers(0, NUM_BLOCKS - 1)


def test_without_space_there_is_nothing_to_do():
    swap = SwapSpace(store_of_noise(FP32), 0)
    swap.swap_out([])
    swap.swap_in([])


def test_memory_that_the_system_refuses_is_a_clear_error():
    with pytest.raises(MemoryFitError, match=r"refused .* blocks of swap space; lower swap_space"):
        SwapSpace(KVStore.allocate(SHAPE, FP32, 1, 16), 2**45)


def fit(free: int, swap_space: int | float | str | None, **config: object) -> MemoryReport:
    settings = {"block_size": 16, "num_kv_blocks": 10, "swap_space": swap_space} | config
    return fit_pool(EngineConfig(**settings), SHAPE, FP32, 2048, free)


@given(space=st.integers(BLOCK, 90 * BLOCK))
def test_the_swap_space_fills_the_bytes_it_is_given(space):
    report = fit(100 * BLOCK, space)
    assert (report.num_blocks, report.swap_blocks) == (10, space // BLOCK)
    assert report.swap_bytes <= space < report.swap_bytes + BLOCK
    assert report.pool_bytes == 10 * BLOCK, "the pool is as large as without"


@pytest.mark.parametrize(("share", "blocks"), [(0.5, 50), ("25%", 25), (0.9, 90), ("0.01", 1)])
def test_a_fraction_is_one_of_all_free_memory(share, blocks):
    assert fit(100 * BLOCK, share).swap_blocks == blocks


def test_left_out_there_is_none():
    report = fit(100 * BLOCK, None)
    assert (report.swap_blocks, report.swap_bytes) == (0, 0)
    assert "swap" not in report.describe()


def test_the_report_tells_its_size():
    report = fit(2**40, "3MiB")
    assert report.swap_blocks == 3 * 2**20 // BLOCK
    assert report.describe().endswith("; 3 MiB of swap space")
    assert report.pool_bytes == fit(2**40, None).pool_bytes
    assert report.tokens_in("fp16") == fit(2**40, None).tokens_in("fp16")


def test_what_the_pool_leaves_must_do():
    assert fit(15 * BLOCK, 5 * BLOCK).swap_blocks == 5
    with pytest.raises(
        MemoryFitError, match=r"swap_space needs .* beside the KV cache .* MiB are free; lower swap_space, kv_c"
    ):
        fit(15 * BLOCK, 6 * BLOCK)
    with pytest.raises(MemoryFitError, match="swap_space needs"):
        fit(15 * BLOCK, 0.5)
    half = fit(100 * BLOCK, "50%", num_kv_blocks=None, kv_cache_memory="50%")
    assert (half.num_blocks, half.swap_blocks) == (50, 50)


def test_less_than_a_block_is_refused():
    with pytest.raises(
        MemoryFitError, match=r"swap_space is 4 bytes, one block .* takes 32,768; .* has a unit: '2GiB'"
    ):
        fit(100 * BLOCK, 4)
    with pytest.raises(MemoryFitError, match="swap_space is 32,767 bytes"):
        fit(100 * BLOCK, BLOCK - 1)
    with pytest.raises(MemoryFitError, match="swap_space is 16,384 bytes"):
        fit(50 * BLOCK, 0.01)


def test_beside_a_gpu_it_takes_the_hosts_memory():
    """What the pool leaves of the device's has nothing to do with it."""

    def fit_beside(host: int, swap_space: int | float) -> int:
        config = EngineConfig(block_size=16, num_kv_blocks=10, swap_space=swap_space)
        return fit_pool(config, SHAPE, FP32, 2048, 11 * BLOCK, "cuda", host).swap_blocks

    assert fit_beside(100 * BLOCK, 60 * BLOCK) == 60
    assert fit_beside(100 * BLOCK, 0.5) == 50
    with pytest.raises(MemoryFitError, match=r"of the host's memory, .* MiB are free; lower swap_space$"):
        fit_beside(30 * BLOCK, 60 * BLOCK)
