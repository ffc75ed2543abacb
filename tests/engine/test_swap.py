"""Preempted sequences that wait in the swap space: they go on from the very bytes they left."""

from __future__ import annotations

from array import array

import pytest
import torch

from kvant.cache.store import KVStore, SwapSpace
from kvant.config import SamplingParams
from kvant.engine.runner import Runner
from kvant.engine.sequence import Plan, Request, Row
from kvant.formats.kv import KVPlan, resolve_kv_format
from tests.engine.drive import PLANS, Ask, Outcome, assert_same, core_of, drive, drive_alone, text

pytestmark = pytest.mark.usefixtures("single_thread")

ROOM = 96
SHARED = text(1, 40)


def requests() -> list[Ask]:
    """Texts that each nearly fill the pool: single ones, choices, some that begin alike."""

    def endless(seed: int, **changes: object) -> SamplingParams:
        return SamplingParams(**{"temperature": 1.3, "max_tokens": 40, "seed": seed, "ignore_eos": True} | changes)

    return [
        (SHARED, endless(1)),
        (text(2, 25), endless(2, n=3)),
        (SHARED[:29] + text(3, 4), endless(3, temperature=0)),
        (text(4, 1), endless(4)),
    ]


@pytest.fixture(scope="module")
def alone(tiny_model):
    """What each request gives in an engine of its own, by KV plan."""
    return {plan: drive_alone(tiny_model, requests(), PLANS[plan]) for plan in ("fp32", "int4_plain", "int4", "mixed")}


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many tokens each step of any engine computes."""
    counts: list[int] = []
    launch = Runner.launch

    def counting(self, plan, after=None):
        counts.append(plan.num_tokens)
        return launch(self, plan, after)

    monkeypatch.setattr(Runner, "launch", counting)
    return counts


@pytest.mark.parametrize("budget", [7, 64])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("plan", ["fp32", "int4_plain", "int4", "mixed"])
def test_sequences_go_on_from_the_bytes_they_left(tiny_model, alone, computed, plan, caching, budget):
    core = core_of(
        tiny_model,
        PLANS[plan],
        room=ROOM,
        max_model_len=ROOM,
        swap_space="4MiB",
        enable_prefix_caching=caching,
        max_num_batched_tokens=budget,
    )
    outcome = drive(core, requests())
    assert_same(outcome, alone[plan])
    assert core.stats().swaps == outcome.preemptions > 0
    assert core.stats().swap_blocks_used == 0
    if not caching:
        assert sum(computed) == fewest_tokens(outcome), "nothing is computed twice"


def fewest_tokens(outcome: Outcome) -> int:
    """Each prompt once, and each token of an output but the last."""
    outputs = [output for request in outcome.outputs for output in request]
    return sum(len(r.prompt) for r in outcome.requests) + sum(len(output) - 1 for output in outputs)


@pytest.mark.parametrize("plan", ["fp32", "int4"])
def test_what_finds_no_room_is_computed_again(tiny_model, alone, computed, plan):
    """The space holds one text of some 60 tokens."""
    settings = {"room": ROOM, "max_model_len": ROOM, "enable_prefix_caching": False}
    small = core_of(tiny_model, PLANS[plan]).memory.block_bytes * (8 if plan == "fp32" else 5)
    core = core_of(tiny_model, PLANS[plan], swap_space=small, **settings)
    outcome = drive(core, requests())
    assert_same(outcome, alone[plan])
    assert 0 < core.stats().swaps < outcome.preemptions
    assert core.stats().swap_blocks_used == 0
    with_little = sum(computed)
    computed.clear()
    drive(core_of(tiny_model, PLANS[plan], **settings), requests())
    assert fewest_tokens(outcome) < with_little < sum(computed)


def test_the_swap_space_empties_when_a_request_is_aborted(tiny_model):
    core = core_of(tiny_model, room=ROOM, max_model_len=ROOM, swap_space="4MiB")
    taken = [core.request(prompt, sampling, lambda *event: None) for prompt, sampling in requests()]
    for request in taken:
        core.add(request)
    while not core.stats().swap_blocks_used:
        core.step()
    for request in taken:
        core.abort(request)
    assert core.stats().swap_blocks_used == core.stats().kv_blocks_used == core.stats().waiting == 0


def test_blocks_are_given_away_only_after_they_were_read(tiny_model):
    """Block 1 is swapped out and copied into; block 2 is copied and swapped into; block 3 is computed in."""
    decoder = tiny_model.decoder
    plan = KVPlan.uniform(resolve_kv_format("fp32", torch.float32), 2)
    store = KVStore.allocate(decoder.spec.kv_shape, plan, 4, 8)
    planes = [plane for layer in store.layers for plane in layer.planes.values()]
    for plane in planes:
        plane.copy_(torch.arange(4).view(4, 1, 1, 1).expand_as(plane))
    swap = SwapSpace(store, 2)
    swap.swap_out([(0, 1)])
    request = Request((5,), SamplingParams(max_tokens=1), 0, lambda *event: None)
    [sequence] = request.sequences
    sequence.blocks = array("q", [3])
    rows = (Row(sequence, 0, 1, (sequence,)),)
    [sampled] = Runner(decoder, store, swap).run(Plan(rows, ((2, 1),), swaps_out=((1, 0),), swaps_in=((1, 2),)))
    assert [item.sequence for item in sampled] == [sequence]
    assert all(plane[:3].flatten(1).unique(dim=1).flatten().tolist() == [0, 2, 0] for plane in planes)
    swap.swap_in([(0, 0)])
    assert all((plane[0] == 1).all() for plane in planes)
