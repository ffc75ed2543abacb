"""A core's limits, and what it says of itself."""

from __future__ import annotations

import pytest

from kvant.config import EngineConfig, SamplingParams
from kvant.engine.core import Core
from kvant.errors import ConfigError, MemoryFitError
from tests.engine.drive import core_of, drive, text

pytestmark = pytest.mark.usefixtures("single_thread")


def test_blocks_are_used_then_cached_then_used_again(tiny_model):
    core = core_of(tiny_model, num_kv_blocks=40)
    sampling = SamplingParams(n=2, max_tokens=3, ignore_eos=True)
    request = core.request(text(1, 20), sampling, lambda *event: None)
    core.add(request)
    assert (core.stats().running, core.stats().waiting, core.stats().kv_blocks_used) == (0, 2, 0)
    core.step()
    now = core.stats()
    assert (now.running, now.waiting, now.kv_blocks_used, now.kv_blocks_cached, now.kv_blocks_total) == (2, 0, 3, 0, 40)
    while core.has_work():
        core.step()
    # 22 tokens of either choice were computed: two blocks in common, and one of each's own.
    assert (core.stats().kv_blocks_used, core.stats().kv_blocks_cached) == (0, 4)
    core.add(core.request(text(1, 20), sampling, lambda *event: None))
    core.step()
    assert (core.stats().kv_blocks_used, core.stats().kv_blocks_cached) == (3, 2)


def test_nothing_is_kept_without_prefix_caching(tiny_model):
    core = core_of(tiny_model, enable_prefix_caching=False)
    for _ in range(2):
        [request] = drive(core, [(text(1, 20), SamplingParams(max_tokens=3))]).requests
        assert request.cached_tokens == 0
        assert core.stats().kv_blocks_cached == core.stats().kv_blocks_used == 0


def test_the_longest_text_is_the_models_or_what_the_pool_holds(tiny_model):
    def longest(**config):
        return Core(tiny_model, EngineConfig(block_size=16, **config)).max_model_len

    assert longest(num_kv_blocks=100) == tiny_model.spec.max_position == 512
    assert longest(num_kv_blocks=3) == 48
    assert longest(num_kv_blocks=3, max_model_len=40) == 40
    with pytest.raises(ConfigError, match="max_model_len=513 exceeds the 512 tokens"):
        longest(max_model_len=513)
    with pytest.raises(MemoryFitError, match="max_model_len=49"):
        longest(num_kv_blocks=3, max_model_len=49)
    with pytest.raises(ConfigError, match="kv_cache_dtype='int5'"):
        longest(kv_cache_dtype="int5")


def test_the_swap_space_is_counted_in_blocks(tiny_model):
    """A block of 8 tokens in float32: two layers with 2 heads of 16 elements, keys and values."""
    block_bytes = 8 * 2 * 2 * 2 * 16 * 4
    core = core_of(tiny_model, swap_space=5 * block_bytes + 1)
    assert (core.stats().swap_blocks_total, core.stats().swap_blocks_used, core.stats().swaps) == (5, 0, 0)
    assert core_of(tiny_model).stats().swap_blocks_total == 0
    with pytest.raises(MemoryFitError, match=f"swap_space is {block_bytes - 1:,} bytes, .* takes {block_bytes:,}"):
        core_of(tiny_model, swap_space=block_bytes - 1)


@pytest.mark.parametrize("prompt_length", [1, 15, 47])
def test_a_pool_of_one_sequence_serves_any_text_that_fits(tiny_model, prompt_length):
    core = core_of(tiny_model, block_size=16, num_kv_blocks=3, max_model_len=48, max_num_batched_tokens=10)
    sampling = SamplingParams(temperature=0, ignore_eos=True)
    asks = [(text(seed, prompt_length), sampling) for seed in (1, 2)] * 2
    for [output] in drive(core, asks).outputs:
        assert len(output) == 48 - prompt_length
