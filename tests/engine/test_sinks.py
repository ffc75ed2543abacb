"""An engine whose cache keeps the first tokens of a text in 16 bit: they are shared, copied and forked like others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvant.config import SamplingParams
from kvant.errors import ConfigError
from kvant.formats.kv import KV_FORMATS, KVPlan, LayerPlan
from tests.engine.drive import PLANS, assert_same, core_of, drive, drive_alone, text

pytestmark = pytest.mark.usefixtures("single_thread")

GREEDY = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)


def choices(n: int, seed: int) -> SamplingParams:
    return SamplingParams(n=n, temperature=1.3, max_tokens=9, seed=seed, ignore_eos=True)


def test_texts_that_part_within_the_sinks_find_what_they_have_in_common(tiny_model):
    start = text(13, 40)
    asks = [(start, GREEDY), *((start[:n] + text(14 + n, 25), choices(2, seed=n)) for n in (5, 4, 3, 2, 1))]
    core = core_of(tiny_model, PLANS["mixed"])
    outcomes = [drive(core, [ask]) for ask in asks]
    for ask, outcome in zip(asks, outcomes, strict=True):
        assert_same(outcome, drive_alone(tiny_model, [ask], PLANS["mixed"]))
    assert [outcome.requests[0].cached_tokens for outcome in outcomes] == [0, 5, 4, 3, 2, 1]


@pytest.mark.parametrize("length", range(1, 6))
def test_choices_that_part_within_the_sinks_are_each_their_own(tiny_model, length):
    asks = [(text(20, length), choices(4, seed=7)), (text(20, length), GREEDY)]
    outcome = drive(core_of(tiny_model, PLANS["mixed"], max_num_batched_tokens=5), asks)
    assert_same(outcome, drive_alone(tiny_model, asks, PLANS["mixed"]))
    assert len({tuple(output) for output in outcome.outputs[0]}) == 4
    for index, output in enumerate(outcome.outputs[0]):
        replay = drive(core_of(tiny_model, PLANS["mixed"]), [(asks[0][0] + output, GREEDY)]).kv[0, 0]
        kept = outcome.kv[0, index]
        assert len(kept) >= length + 7
        assert torch.equal(kept, replay[: len(kept)]), "another choice wrote here"


@pytest.mark.parametrize("name", ["int4", "k8v4"])
def test_a_cache_with_sinks_is_16_bit_for_the_first_tokens_and_few_bits_for_the_rest(tiny_model, name):
    """In the first layer, whose keys and values no cache has touched yet."""
    prompt, with_sinks = text(21, 30), PLANS[name].layers[0]
    without = replace(with_sinks, format=replace(with_sinks.format, sinks=0))

    def kept(layer: LayerPlan, side: str) -> Tensor:
        core = core_of(tiny_model, KVPlan("one", (layer, layer)), block_size=16)
        request = core.request(prompt, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True), lambda *_: None)
        core.add(request)
        core.step()
        return core.store.layers[0].read(side, torch.tensor(request.sequences[0].blocks))[:, :30]

    for side in ("key", "value"):
        sinks, wide = kept(with_sinks, side), kept(LayerPlan(KV_FORMATS["fp16"]), side)
        assert torch.equal(sinks[:, :4], wide[:, :4])
        assert torch.equal(sinks[:, 4:], kept(without, side)[:, 4:])
        assert not torch.equal(sinks[:, 4:], wide[:, 4:])


@pytest.mark.parametrize("plan", ["int4", "k8v4", "mixed"])
def test_blocks_too_small_for_the_sinks_are_refused(tiny_model, plan):
    with pytest.raises(ConfigError, match=r"block_size=8 is too small .* use block_size=16 or more"):
        core_of(tiny_model, PLANS[plan], block_size=8)


@pytest.mark.parametrize("prompt_length", [1, 3, 4, 5, 35])
def test_a_pool_of_one_sequence_with_sinks_serves_any_text_that_fits(tiny_model, prompt_length):
    core = core_of(tiny_model, PLANS["int4"], room=36, max_model_len=36, max_num_batched_tokens=10)
    assert core.memory.num_blocks == 3
    asks = [(text(seed, prompt_length), SamplingParams(temperature=0, ignore_eos=True)) for seed in (1, 2)] * 2
    for [output] in drive(core, asks).outputs:
        assert len(output) == 36 - prompt_length
