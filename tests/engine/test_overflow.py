"""Models whose keys are not finite: whoever asks is told so and how to go on, and the others lose nothing by it."""

from __future__ import annotations

import queue
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvant.config import EngineConfig, SamplingParams
from kvant.engine.engine import Engine
from kvant.engine.sequence import Failure
from kvant.errors import NotFiniteError
from kvant.kernels.reference import ReferenceOps
from kvant.pipelines import pipeline
from kvant.weights.load import LoadedModel, load_model
from tests.engine.checkpoint import overflowing, write_checkpoint
from tests.engine.drive import PLANS, Outcome, core_of, drive, drive_alone, text

pytestmark = pytest.mark.usefixtures("single_thread")

MESSAGE = r"the model's keys or values are not finite: it overflows in this dtype.*; try dtype='float32' or 'bfloat16'"
SHORT = SamplingParams(temperature=0, max_tokens=4)
BAD = 200  # the token whose embedding is damaged


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return overflowing(write_checkpoint(tmp_path_factory.mktemp("overflowing")))


@pytest.fixture(scope="module")
def model(path) -> LoadedModel:
    return load_model(path, dtype="float16", ops=ReferenceOps())


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> LoadedModel:
    """The miniature, of which one token is NaN."""
    directory = write_checkpoint(tmp_path_factory.mktemp("damaged"))
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][BAD] = torch.nan
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return load_model(directory, dtype="float32", ops=ReferenceOps())


def whole(seed: int, length: int) -> list[int]:
    """A prompt without the damaged token."""
    return [token if token != BAD else BAD + 1 for token in text(seed, length)]


@pytest.mark.parametrize("plan", PLANS)
def test_a_request_whose_numbers_are_not_finite_fails_and_frees_everything(model, plan):
    core = core_of(model, PLANS[plan])
    request = core.request(text(1, 20), SHORT, lambda *_: None)
    core.add(request)
    [(told, failure)] = core.step()
    assert told is request
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, NotFiniteError)
    assert re.search(MESSAGE, failure.message)
    assert not core.has_work()
    stats = core.stats()
    assert stats.kv_blocks_used == stats.running == stats.waiting == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_remedy_works(path, dtype):
    model = load_model(path, dtype=dtype, ops=ReferenceOps())
    assert drive(core_of(model, PLANS["int4"]), [(text(1, 20), SHORT)]).outputs[0][0]


@pytest.mark.parametrize("plan", ["fp32", "int8", "int4", "mixed"])
@pytest.mark.parametrize("budget", [512, 9])
def test_others_in_the_step_go_on_as_if_nothing_had_been(damaged, plan, budget):
    """To the cache's bytes; the one that fails may have several choices, and share its beginning with the others."""
    sampling = SamplingParams(temperature=1.2, seed=5, max_tokens=8, logit_bias={BAD: -100.0}, n=2)
    shared = whole(1, 30)
    good = [(shared, sampling), (shared[:17] + whole(2, 20), sampling)]
    bad = ([*shared[:20], BAD, *whole(3, 10)], sampling)
    core = core_of(damaged, PLANS[plan], max_num_batched_tokens=budget)
    outcome = drive(core, [good[0], bad, good[1]])
    failed = [(request, event) for request, event in outcome.events if isinstance(event, Failure)]
    assert [request for request, _ in failed] == [outcome.requests[1]]
    assert outcome.outputs[1] == [[], []]
    expected = drive_alone(damaged, good, PLANS[plan])
    assert_survived(outcome, expected, {0: 0, 2: 1})
    assert_survived(drive(core, good), expected, {0: 0, 1: 1})


def assert_survived(outcome: Outcome, expected: Outcome, twins: dict[int, int]) -> None:
    """The same tokens and cache bytes as in `expected`, where requests have other numbers."""
    for number, twin in twins.items():
        assert outcome.outputs[number] == expected.outputs[twin]
        for index in range(2):
            kept, other = outcome.kv[number, index], expected.kv[twin, index]
            common = min(len(kept), len(other))
            assert torch.equal(kept[:common], other[:common])


def test_a_token_drawn_on_the_way_fails_its_text_too(damaged):
    bias = SamplingParams(temperature=0, max_tokens=9, logit_bias={BAD: 100.0})
    outcome = drive(core_of(damaged, PLANS["int8"]), [(whole(1, 20), bias), (whole(2, 20), SHORT)])
    assert outcome.outputs[0] == [[BAD]]
    assert [type(event) for request, event in outcome.events if request is outcome.requests[0]][1:] == [Failure]
    assert outcome.outputs[1] == drive_alone(damaged, [(whole(2, 20), SHORT)], PLANS["int8"]).outputs[0]


def test_the_engine_tells_the_cause_and_serves_on(damaged):
    engine, told = Engine(core_of(damaged, PLANS["int8"])), queue.SimpleQueue()
    engine.submit([*whole(1, 20), BAD], SHORT, lambda _, event: told.put(event))
    failure = told.get(timeout=20)
    assert isinstance(failure, Failure)
    assert re.search(MESSAGE, failure.message)
    engine.submit(whole(1, 20), SHORT, lambda _, event: told.put(event))
    tokens = [told.get(timeout=20).token_id for _ in range(4)]
    assert tokens == drive_alone(damaged, [(whole(1, 20), SHORT)], PLANS["int8"]).outputs[0][0]
    assert engine.stats().healthy
    engine.close()


def test_a_pipeline_raises_it(path):
    config = EngineConfig(dtype="float16", kv_cache_dtype="fp16", num_kv_blocks=40)
    with pipeline(path, engine=config) as pipe:
        for _ in range(2):
            with pytest.raises(NotFiniteError, match=MESSAGE):
                pipe("hello")
