"""Decode steps one after the other in one call, against the same steps one by one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvant.config import SamplingParams
from kvant.engine import runner
from kvant.engine.core import Core
from kvant.engine.engine import Engine
from kvant.engine.runner import Runner
from kvant.engine.sequence import Failure, Plan, Request, TokenEvent
from kvant.errors import NotFiniteError
from kvant.formats.kv import KV_FORMATS
from kvant.kernels.ops import Ops
from kvant.models.fused import FusedDecoder
from kvant.quantize.rtn import rtn
from kvant.weights.load import LoadedModel, load_model
from kvant.weights.matrices import Rounding
from tests.engine.checkpoint import write_checkpoint
from tests.engine.drive import Ask, Outcome, assert_same, core_of, drive, eventually, text
from tests.families.configs import TINIES
from tests.families.tiny import build
from tests.formats.stats import plan_of
from tests.kernels.cpu.test_step import answers

WIDE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64}  # kernels for few bits want such sizes
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.2, top_k=40, top_p=0.95, seed=7, n=2, max_tokens=21, ignore_eos=True)
ASKS: list[Ask] = [
    (text(1, 9), GREEDY),
    (text(2, 30), replace(GREEDY, max_tokens=17)),
    (text(3, 13), DRAWN),
    (text(4, 21), replace(DRAWN, top_k=0, top_p=1, min_p=0.02, max_tokens=30)),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wide"), **WIDE)


@pytest.fixture(autouse=True)
def _no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bursts end for reasons of the test, not because the machine is busy."""
    monkeypatch.setattr(runner, "_BURST_SECONDS", 60.0)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """All that are launched."""
    seen: list[Plan] = []
    launch = Runner.launch

    def watched(self, plan, after=None):
        seen.append(plan)
        return launch(self, plan, after)

    monkeypatch.setattr(Runner, "launch", watched)
    return seen


def load(path: Path, ops: Ops) -> LoadedModel:
    rounding = Rounding("rtn", 4.5, partial(rtn, bits=4, group_size=32))
    return load_model(path, dtype="float32", ops=ops, weights=rounding)


def load_dense(path: Path, ops: Ops) -> LoadedModel:
    return load_model(path, dtype="float32", ops=ops, weights="dense")


def one_by_one(core: Core) -> Core:
    """The same core, all of whose plans are of one step."""
    core._scheduler._max_steps = 1
    return core


def answer(outcome: Outcome, request: int = 0) -> list[int]:
    return outcome.requests[request].sequences[0].output


@pytest.mark.parametrize("kv", ["fp32", "int8", "int4", "sinks"])
def test_tokens_and_cache_are_those_of_steps_one_by_one(native, path, plans, kv):
    """Of texts that end at different times, in blocks of 8 or 16 tokens, some of them shared."""
    model = load(path, native(2))
    name, config = ("int4", {"block_size": 16}) if kv == "sinks" else (kv, {})
    plan = plan_of(KV_FORMATS[name], 2, model.spec.num_kv_heads, model.spec.head_dim)
    asks = [*ASKS, (text(5, 1), GREEDY)]  # which writes sinks as it decodes
    expected = drive(one_by_one(core_of(model, plan, **config)), asks)
    single = len(plans)
    outcome = drive(core_of(model, plan, **config), asks)
    assert max(each.steps for each in plans[:single]) == 1
    assert len(plans) - single < single / 3
    assert_same(outcome, expected)


@pytest.mark.parametrize("family", ["llama-dynamic", "qwen-v1", "gemma-3-1b", "qwen2-windows"])
def test_models_whose_steps_depend_on_more_than_positions_make_them_one_by_one(native, tmp_path, plans, family):
    """RoPE that depends on the text's length, log-n attention; with windows and two kinds of RoPE bursts are right."""
    model = load_dense(build(TINIES[family], tmp_path).published, native(1))
    asks = [([token % 128 for token in text(seed, 5 + seed)], replace(GREEDY, max_tokens=8)) for seed in (1, 2)]
    outcome = drive(core_of(model, max_model_len=32), asks)
    assert any(plan.steps > 1 for plan in plans) == (family in ("gemma-3-1b", "qwen2-windows"))
    assert_same(outcome, drive(one_by_one(core_of(model, max_model_len=32)), asks))


def test_a_stop_ends_a_burst_and_the_others_go_on(native, path):
    model = load(path, native(1))
    whole = answer(drive(one_by_one(core_of(model)), ASKS[:1]))
    place = next(place for place, token in enumerate(whole) if place > 4 and token not in whole[:place])
    asks = [(ASKS[0][0], replace(GREEDY, stop_token_ids=[whole[place]])), ASKS[1]]
    outcome = drive(core_of(model), asks)
    assert answer(outcome) == whole[: place + 1]
    assert_same(outcome, drive(one_by_one(core_of(model)), asks))


def test_each_wish_that_needs_the_host_has_steps_one_by_one(native, path, plans):
    model = load(path, native(1))
    wishes = ({"logprobs": 1}, {"repetition_penalty": 1.2}, {"logit_bias": {3: 1.0}}, {"min_tokens": 30})
    for wish in wishes:
        drive(core_of(model), [(text(1, 9), replace(GREEDY, **wish)), ASKS[1]])
        assert {plan.steps for plan in plans if len(plan.rows) == 2} == {1}
        plans.clear()


def tokens_of(core: Core) -> int:
    """Tokens of the next step."""
    return len(core.step())


def test_a_burst_ends_as_soon_as_somebody_wants_the_host(native, path):
    core = core_of(load(path, native(1)))
    core.add(core.request(text(1, 9), GREEDY, lambda *event: None))
    assert [tokens_of(core) for _ in range(2)] == [1, 8], "the prompt's own token is not held up"
    core.interrupt.set()
    assert [tokens_of(core) for _ in range(3)] == [1, 1, 1]
    core.interrupt.clear()
    assert tokens_of(core) == 8


def test_a_burst_takes_no_longer_than_it_may(native, path, monkeypatch):
    core = core_of(load(path, native(1)))
    core.add(core.request(text(1, 9), GREEDY, lambda *event: None))
    tokens_of(core)
    monkeypatch.setattr(runner, "_BURST_SECONDS", 0.0)
    assert tokens_of(core) == 1


def test_a_known_prompts_first_token_comes_alone(native, path):
    core = core_of(load(path, native(1)))
    for _ in range(2):
        core.add(core.request(text(1, 17), replace(GREEDY, max_tokens=3), lambda *event: None))
        assert tokens_of(core) == 1
        assert tokens_of(core) == 2


def test_what_is_not_finite_in_a_burst_ends_its_own_request(native, path, tmp_path):
    """One token that the first request draws is damaged; the second draws no such token."""
    alone = drive(one_by_one(core_of(load_dense(path, native(1)))), ASKS[:2])
    first, second = answer(alone), answer(alone, 1)
    bad = next(token for token in first[2:8] if token not in (*second, *ASKS[0][0], *ASKS[1][0]))
    weights = load_file(path / "model.safetensors")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).clone()
    weights["model.embed_tokens.weight"][bad] = torch.inf
    damaged = write_checkpoint(tmp_path, **WIDE)
    save_file(weights | {"lm_head.weight": head}, damaged / "model.safetensors", metadata={"format": "pt"})
    core = core_of(load_dense(damaged, native(1)))
    requests = [core.request(prompt, wish, lambda *event: None) for prompt, wish in ASKS[:2]]
    for request in requests:
        core.add(request)
    events: list[tuple[Request, TokenEvent | Failure]] = []
    while core.has_work():
        events += core.step()
    failures = [(request, event) for request, event in events if isinstance(event, Failure)]
    assert [(request, type(event.error)) for request, event in failures] == [(requests[0], NotFiniteError)]
    assert requests[0].sequences[0].output == first[: first.index(bad) + 1], "what came before is told"
    assert requests[1].sequences[0].output == second


@pytest.fixture
def bursts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Steps that were planned and done of each burst."""
    seen: list[tuple[int, int]] = []
    draw = FusedDecoder.draw

    def watched(self, *step):
        tokens = draw(self, *step)
        seen.append((step[-1].steps, len(tokens)))
        return tokens

    monkeypatch.setattr(FusedDecoder, "draw", watched)
    return seen


def test_a_submission_and_an_abort_end_the_burst_that_they_meet(native, path, bursts, monkeypatch):
    """They come when its plan is made already."""
    engine = Engine(core_of(load(path, native(1)), num_kv_blocks=800))
    launch, later = Runner.launch, []

    def interrupted(self, plan, after=None):
        if plan.steps > 1 and len(bursts) in (2, 6):
            later.append(engine.submit(text(2, 9), GREEDY, lambda *event: None) if not later else engine.abort(first))
        return launch(self, plan, after)

    monkeypatch.setattr(Runner, "launch", interrupted)
    try:
        first = engine.submit(text(1, 9), replace(GREEDY, max_tokens=150), lambda *event: None)
        eventually(lambda: len(later) == 2 and later[0].sequences[0].finish_reason is not None)
        assert first.sequences[0].finish_reason == "abort"
    finally:
        engine.close()
    assert bursts[:2] == [(8, 8)] * 2
    assert bursts[2] == (8, 1)
    assert bursts[6][1] == 1


def test_engines_that_share_the_pool_take_turns_in_their_bursts(native, path, bursts):
    model = load(path, native(2))
    engines = [Engine(core_of(model)) for _ in range(2)]
    try:
        wish = replace(GREEDY, max_tokens=170)
        for _ in range(20):  # on a busy machine one may be done before the other begins
            requests = [engine.submit(text(n, 9), wish, lambda *event: None) for n, engine in enumerate(engines)]
            eventually(lambda asked=requests: all(it.sequences[0].finish_reason == "length" for it in asked))
            if any(done < planned for planned, done in bursts):
                break
    finally:
        for engine in engines:
            engine.close()
    assert any(done < planned for planned, done in bursts), "one has made way for the other"


def test_steps_that_overlap_draw_too(native, path):
    """A prompt that the cache knows begins with a step that only decodes."""
    model = load(path, native(1))
    asks = [(text(1, 17), GREEDY), (text(2, 17), replace(GREEDY, min_tokens=4, ignore_eos=False))]
    cores = core_of(model, async_scheduling=True), core_of(model)
    for _ in range(2):
        found, expected = ([answer.tokens for answer in answers(core, asks)] for core in cores)
        assert found == expected


def test_a_sink_that_fails_within_a_burst_hears_no_more_of_it(native, path):
    engine = Engine(core_of(load(path, native(1))))
    heard: list[TokenEvent | Failure] = []

    def fails(_: Request, event: TokenEvent | Failure) -> None:
        heard.append(event)
        if len(heard) == 4:
            raise ValueError("no more")

    try:
        request = engine.submit(text(1, 9), GREEDY, fails)
        eventually(lambda: request.sequences[0].finish_reason == "abort")
        eventually(lambda: not engine.stats().running)
    finally:
        engine.close()
    assert len(heard) == 4
