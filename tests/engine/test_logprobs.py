"""Log-probabilities of outputs and prompts, against log_softmax over the whole text at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvant.config import SamplingParams
from kvant.engine.logprobs import logprob_rows
from kvant.engine.outputs import TokenLogprobs
from tests.engine.drive import core_of, drive, text
from tests.support import model_logits

pytestmark = pytest.mark.usefixtures("single_thread")

PROMPT = text(31, 50)
GREEDY = SamplingParams(temperature=0, max_tokens=5)


def assert_reports(reported: TokenLogprobs, row: Tensor, token: int, top: int) -> None:
    """What is said of a token, against its row of log-probabilities [vocab]."""
    assert reported.token_id == token
    assert reported.logprob == pytest.approx(float(row[token]), abs=1e-4)
    assert reported.rank == 1 + int((row > row[token]).sum())
    values, ids = row.sort(descending=True)
    assert [i for i, _ in reported.top] == ids[:top].tolist()
    assert [value for _, value in reported.top] == pytest.approx(values[:top].tolist(), abs=1e-4)


def assert_prompt(found: list[TokenLogprobs | None], path, prompt: list[int], top: int) -> None:
    rows = model_logits(path, prompt).log_softmax(-1)
    assert len(found) == len(prompt)
    assert found[0] is None
    for position in range(1, len(prompt)):
        assert_reports(found[position], rows[position - 1], prompt[position], top)


@pytest.mark.parametrize("top", [0, 3, 32])
def test_output_logprobs_are_the_models_own_whatever_reshapes_the_draw(tiny_model, tiny_path, top):
    wish = SamplingParams(
        temperature=1.8, top_k=20, repetition_penalty=1.3, logit_bias={7: 3.0}, n=2, seed=1, max_tokens=8, logprobs=top
    )
    outcome = drive(core_of(tiny_model), [(PROMPT, wish)])
    told = {0: [], 1: []}
    for _, event in outcome.events:
        told[event.index].append(event.logprobs)
    for output, reported in zip(outcome.outputs[0], told.values(), strict=True):
        rows = model_logits(tiny_path, PROMPT + output)[len(PROMPT) - 1 : -1].log_softmax(-1)
        assert len(reported) == len(output)
        for row, token, one in zip(rows, output, reported, strict=True):
            assert_reports(one, row, token, top)


def test_no_logprobs_unless_asked_for(tiny_model):
    outcome = drive(core_of(tiny_model), [(PROMPT, GREEDY)])
    assert all(event.logprobs is None for _, event in outcome.events)
    assert outcome.requests[0].prompt_logprobs == [None]


@pytest.mark.parametrize("budget", [2, 7, 64, 512])
def test_prompt_logprobs_in_chunks_among_others_and_after_the_prompt_was_cached(tiny_model, tiny_path, budget):
    core = core_of(tiny_model, max_num_batched_tokens=budget)
    drive(core, [(PROMPT, GREEDY)])
    wish = SamplingParams(temperature=0, max_tokens=3, n=2, prompt_logprobs=4)
    asks = [(PROMPT, wish), (text(32, 20), GREEDY), (text(33, 1), wish), (text(34, 90), wish)]
    for request in drive(core, asks).requests:
        if request.sampling.prompt_logprobs is not None:
            assert_prompt(request.prompt_logprobs, tiny_path, list(request.prompt), 4)


@pytest.mark.parametrize("budget", [4, 5, 6, 7])
def test_prompt_logprobs_survive_preemption_in_the_midst_of_the_prompt(tiny_model, tiny_path, budget):
    core = core_of(tiny_model, max_num_batched_tokens=budget, max_model_len=64, num_kv_blocks=8)
    prompt = PROMPT[:39]
    first = core.request(text(35, 23), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True), lambda *e: None)
    second = core.request(prompt, SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2), lambda *e: None)
    core.add(first)
    core.add(second)
    partial = 0
    while core.has_work():
        before = core.stats().preemptions
        computed = second.sequences[0].computed
        core.step()
        if core.stats().preemptions > before and 0 < computed < len(prompt):
            partial += 1
    assert partial > 0, "nothing was preempted inside its prompt: the test proves nothing"
    assert_prompt(second.prompt_logprobs, tiny_path, prompt, 2)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_prompt_logprobs_outlive_the_choice_that_computed_them(tiny_model, tiny_path, steps):
    core = core_of(tiny_model, max_num_batched_tokens=16)
    drive(core, [(PROMPT, GREEDY)])
    request = core.request(PROMPT, SamplingParams(n=3, max_tokens=3, prompt_logprobs=1, seed=1), lambda *event: None)
    core.add(request)
    for _ in range(steps):
        core.step()
    core.abort(request, 0)
    while core.has_work():
        core.step()
    assert [len(sequence.output) for sequence in request.sequences] == [0, 3, 3]
    assert_prompt(request.prompt_logprobs, tiny_path, PROMPT, 1)


def test_all_of_a_step_are_told_at_once(tiny_model, tiny_path, monkeypatch):
    """However many each wants, beside others that want none."""
    made = []

    def watched(logits, tokens, top):
        made.append((len(tokens), top))
        return logprob_rows(logits, tokens, top)

    monkeypatch.setattr("kvant.engine.runner.logprob_rows", watched)
    tops = (2, None, 0, 32, None)
    asks = [(text(seed, 9), SamplingParams(max_tokens=3, seed=seed, logprobs=top)) for seed, top in enumerate(tops)]
    outcome = drive(core_of(tiny_model, async_scheduling=True), asks)
    assert made == [(3, 32)] * 3
    for (prompt, _), request, top in zip(asks, outcome.requests, tops, strict=True):
        output = request.sequences[0].output
        rows = model_logits(tiny_path, prompt + output)[len(prompt) - 1 : -1].log_softmax(-1)
        told = [event.logprobs for owner, event in outcome.events if owner is request]
        for row, token, one in zip(rows, output, told, strict=True):
            assert one is None if top is None else assert_reports(one, row, token, top) is None


def test_many_rows_are_as_each_alone():
    logits = torch.randn(150, 40, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(150) % 40
    alone = torch.cat([logprob_rows(logits[row : row + 1], tokens[row : row + 1], 50) for row in range(150)])
    assert torch.equal(logprob_rows(logits, tokens, 50), alone)
    assert alone.shape == (150, 82)


def test_ranks_count_ties_as_equal():
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0]).expand(4, -1)
    assert logprob_rows(logits, torch.arange(4), 0)[:, 1].tolist() == [3, 1, 1, 4]
