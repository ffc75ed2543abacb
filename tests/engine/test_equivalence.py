"""The same requests, the same tokens and the same cache bytes, however they are run."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from kvant.config import SamplingParams
from kvant.kernels.reference import ReferenceOps
from kvant.weights.load import load_model
from tests.engine.checkpoint import write_checkpoint
from tests.engine.drive import PLANS, Ask, assert_same, core_of, drive, drive_alone, text
from tests.support import model_logits_generate

pytestmark = pytest.mark.usefixtures("single_thread")

GREEDY = SamplingParams(temperature=0, max_tokens=12)
SHARED = text(1, 60)
WAYS: dict[str, dict[str, Any]] = {
    "batched": {},
    "budget-3": {"max_num_batched_tokens": 3},
    "budget-7": {"max_num_batched_tokens": 7, "enable_prefix_caching": False},
    "budget-64": {"max_num_batched_tokens": 64, "block_size": 32},
    "tiny-pool": {"room": 192, "max_num_batched_tokens": 33},
    "tiny-pool-nothing-shared": {"room": 192, "enable_prefix_caching": False},
    "two-at-a-time": {"max_num_seqs": 4, "room": 192},
    "overlapping": {"async_scheduling": True},
    "overlapping-budget-7": {"async_scheduling": True, "max_num_batched_tokens": 7},
    "tiny-pool-overlapping": {"async_scheduling": True, "room": 192, "max_num_batched_tokens": 33},
}


def sampled(seed: int, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 1.3, "top_p": 0.95, "max_tokens": 12, "seed": seed} | changes))


def requests() -> list[Ask]:
    """Prompts that share beginnings, one that spans the reference's tiles, greedy and sampled, one and more choices."""
    return [
        (text(0, 1), GREEDY),
        (SHARED, sampled(3, n=3)),
        (SHARED[:37] + text(2, 9), GREEDY),
        (SHARED, sampled(4)),
        (text(5, 140), sampled(5, max_tokens=20, top_k=40)),
        (SHARED[:16], sampled(6, min_p=0.02, n=2)),
        (text(7, 33), SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.4, min_tokens=5)),
    ]


def two_requests() -> list[Ask]:
    """Two that share nothing."""
    return [(text(8, 70), GREEDY), (text(9, 45), sampled(1))]


@pytest.fixture(scope="module")
def alone(tiny_model):
    """What each request gives in an engine of its own, by KV plan; computed when first asked for."""

    @cache
    def outcome(plan, asks=requests):
        return drive_alone(tiny_model, asks(), PLANS[plan])

    return outcome


@pytest.mark.parametrize(
    ("plan", "way"),
    [*product(("int4", "mixed"), WAYS), *product(("fp32", "int8", "fp8_e4m3"), ("batched", "budget-3", "tiny-pool"))],
)
def test_company_chunks_and_preemption_change_nothing(tiny_model, alone, plan, way):
    outcome = drive(core_of(tiny_model, PLANS[plan], **WAYS[way]), requests())
    assert_same(outcome, alone(plan))
    if way.startswith("tiny-pool"):
        assert outcome.preemptions > 0


@pytest.mark.parametrize("plan", ["int4", "k8v4"])
def test_token_by_token_is_the_same_too(tiny_model, alone, plan):
    outcome = drive(core_of(tiny_model, PLANS[plan], max_num_batched_tokens=1), two_requests())
    assert_same(outcome, alone(plan, two_requests))


@pytest.mark.parametrize(
    ("plan", "budget"), [*(("int8", n) for n in range(2, 65, 5)), *(("mixed", n) for n in (2, 3, 5))]
)
def test_every_chunk_size_gives_the_same_bytes(tiny_model, alone, plan, budget):
    outcome = drive(core_of(tiny_model, PLANS[plan], max_num_batched_tokens=budget), two_requests())
    assert_same(outcome, alone(plan, two_requests))


@pytest.mark.parametrize("plan", PLANS)
def test_every_format_keeps_the_promise(tiny_model, plan):
    """In chunks that sinks and tiles do not divide, forked, preempted, and from the prefix cache."""
    endless = {"max_tokens": 20, "ignore_eos": True}
    asks = [(SHARED[:30], sampled(7, n=2, **endless)), (SHARED[:21] + text(10, 9), sampled(8, **endless))]
    expected = drive_alone(tiny_model, asks, PLANS[plan])
    core = core_of(tiny_model, PLANS[plan], room=50, max_model_len=50, max_num_batched_tokens=23)
    outcome = drive(core, asks)
    assert_same(outcome, expected)
    assert outcome.preemptions > 0
    again = drive(core, asks[:1])
    assert again.requests[0].cached_tokens > 0
    assert_same(again, drive_alone(tiny_model, asks[:1], PLANS[plan]))


@pytest.mark.parametrize("plan", ["int4", "mixed"])
def test_arrival_in_the_midst_of_others_changes_nothing(tiny_model, alone, plan):
    core = core_of(tiny_model, PLANS[plan], room=240, max_num_batched_tokens=16)
    taken = [core.request(prompt, sampling, lambda *event: None) for prompt, sampling in requests()]
    steps = 0
    while core.has_work() or steps // 5 < len(taken):
        if steps % 5 == 0 and steps // 5 < len(taken):
            core.add(taken[steps // 5])
        core.step()
        steps += 1
    assert [[s.output for s in request.sequences] for request in taken] == alone(plan).outputs


@pytest.mark.parametrize("plan", ["int4", "mixed"])
def test_what_was_cached_before_changes_nothing(tiny_model, alone, plan):
    core = core_of(tiny_model, PLANS[plan])
    for _ in range(2):
        outcome = drive(core, requests())
        assert_same(outcome, alone(plan))
    for request in outcome.requests:
        assert request.cached_tokens == len(request.prompt) - 1


@pytest.mark.parametrize("plan", ["int4", "mixed"])
def test_aborted_neighbours_change_nothing(tiny_model, alone, plan):
    core = core_of(tiny_model, PLANS[plan], room=240)
    taken = [core.request(prompt, sampling, lambda *event: None) for prompt, sampling in requests()]
    for request in taken:
        core.add(request)
    for _ in range(4):
        core.step()
    core.abort(taken[3])
    core.abort(taken[1], 0)
    while core.has_work():
        core.step()
    for request, expected in zip(taken, alone(plan).outputs, strict=True):
        for sequence, whole in zip(request.sequences, expected, strict=True):
            aborted = sequence.finish_reason == "abort"
            assert aborted == (request is taken[3] or (request is taken[1] and sequence.index == 0))
            assert sequence.output == (whole[: len(sequence.output)] if aborted else whole)


def test_choices_differ_from_each_other_and_are_the_same_in_smaller_company(tiny_model):
    few, many = (drive(core_of(tiny_model), [(SHARED, sampled(3, n=n))]) for n in (2, 5))
    assert many.outputs[0][:2] == few.outputs[0]
    assert len({tuple(output) for output in many.outputs[0]}) == 5


def test_greedy_is_what_decoding_by_hand_gives(tiny_model, tiny_path):
    asks = [(text(seed, length), GREEDY) for seed, length in ((10, 3), (11, 50), (12, 150))]
    outcome = drive(core_of(tiny_model, max_num_batched_tokens=20), asks)
    for (prompt, _), [output] in zip(asks, outcome.outputs, strict=True):
        assert output == model_logits_generate(tiny_path, prompt, 12)[0][: len(output)]
        assert len(output) == 12 or output[-1] in tiny_model.eos_token_ids


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("bfloat16", {}),
    "float16": ("float16", {}),
    "window": ("float32", {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 19}),
    # Within its 32 tokens a prefix has the same KV in any prompt, beyond them only in prompts of the same length.
    "dynamic-rope": (
        "float32",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}, "max_position_embeddings": 32},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_models_keep_the_promise(tmp_path, variant):
    dtype, changes = VARIANTS[variant]
    model = load_model(write_checkpoint(tmp_path, **changes), dtype=dtype, ops=ReferenceOps())
    core = core_of(model, PLANS["int4"], room=192, max_num_batched_tokens=16)
    asks = requests()
    expected = drive_alone(model, asks, PLANS["int4"])
    outcome = drive(core, asks)
    assert_same(outcome, expected)
    assert outcome.preemptions > 0
    assert_same(drive(core, asks[::-1]), drive_alone(model, asks[::-1], PLANS["int4"]))


def test_prefixes_are_not_shared_where_the_prompts_length_changes_their_kv(tmp_path):
    _, changes = VARIANTS["dynamic-rope"]
    model = load_model(write_checkpoint(tmp_path, **changes), dtype="float32", ops=ReferenceOps())
    core = core_of(model)
    prompt = text(1, 60)
    kv = [drive(core, [(prompt[:length], GREEDY)]).kv[0, 0] for length in (60, 50, 30)]
    assert not torch.equal(kv[0][:30], kv[1][:30])
    cached = [drive(core, [(prompt[:n], GREEDY)]).requests[0].cached_tokens for n in (60, 50, 40, 30, 20)]
    assert cached == [59, 49, 0, 29, 19]


@pytest.mark.parametrize("plan", ["fp32", "mixed"])
def test_what_lies_in_unused_slots_does_not_matter(tiny_model, plan):
    """Even NaN, left by another text: masked weights are 0, and 0 * NaN would be NaN."""
    outputs = []
    for rubbish in (0, 255):
        core = core_of(tiny_model, PLANS[plan])
        for layer in core.store.layers:
            for plane in layer.planes.values():
                plane.view(torch.uint8).fill_(rubbish)
        sampling = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        taken = [core.request(text(1, length), sampling, lambda *_: None) for length in (1, 21)]
        for request in taken:
            core.add(request)
        while core.has_work():
            core.step()
        outputs.append([request.sequences[0].output for request in taken])
    assert outputs[0] == outputs[1]
