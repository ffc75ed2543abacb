"""What a request may ask of its sampling, against the model's logits reshaped by other means."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvant.config import EngineConfig, SamplingParams
from kvant.engine.core import Core
from kvant.engine.sampler import Sampler
from kvant.engine.sequence import Request
from kvant.errors import RequestError
from kvant.kernels.reference import ReferenceOps
from tests.engine.checkpoint import END, VOCAB
from tests.engine.drive import core_of, drive, text
from tests.support import model_logits

pytestmark = pytest.mark.usefixtures("single_thread")

PROMPT = text(21, 30)


@pytest.fixture
def core(tiny_model) -> Core:
    return core_of(tiny_model)


def answer(core: Core, **wishes) -> list[int]:
    [[output]] = drive(core, [(PROMPT, SamplingParams(**({"temperature": 0} | wishes)))]).outputs
    return output


def reason(core: Core, **wishes) -> str | None:
    [request] = drive(core, [(PROMPT, SamplingParams(**({"temperature": 0} | wishes)))]).requests
    return request.sequences[0].finish_reason


def scores(path, output: list[int]) -> np.ndarray:
    """The model's logits [len(output), vocab] that each output token was chosen from."""
    return model_logits(path, PROMPT + output)[len(PROMPT) - 1 : -1].double().numpy()


def penalized(row: np.ndarray, before: list[int], repetition=1.0, presence=0.0, frequency=0.0, bias=None) -> np.ndarray:
    """One row as vLLM documents the penalties, token by token."""
    out = row.copy()
    for token in range(VOCAB):
        if token in PROMPT or token in before:
            out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
        out[token] -= frequency * before.count(token) + presence * (token in before)
        out[token] += (bias or {}).get(token, 0.0)
    return out


@pytest.mark.parametrize(
    "wishes",
    [
        {"repetition": 1.7},
        {"repetition": 0.6},
        {"presence": 4.0},
        {"frequency": 1.5},
        {"frequency": -2.0},
        {"bias": {5: 9.0, 17: 7.5, 254: -100.0}},
        {"repetition": 1.2, "presence": 1.0, "frequency": 0.5, "bias": {5: 6.0, 17: 6.0}},
    ],
    ids=str,
)
def test_penalties_and_bias(core, tiny_path, wishes):
    names = {"repetition": "repetition_penalty", "presence": "presence_penalty", "frequency": "frequency_penalty"}
    asked = {names.get(name, "logit_bias"): value for name, value in wishes.items()}
    output = answer(core, **asked, max_tokens=24, ignore_eos=True)
    rows = scores(tiny_path, output)
    expected = [int(penalized(row, output[:i], **wishes).argmax()) for i, row in enumerate(rows)]
    assert output == expected
    assert output != answer(core, max_tokens=24, ignore_eos=True), "the wish had no effect: the test proves nothing"


def test_a_repetition_penalty_pushes_negative_logits_down_too():
    request = Request((0,), SamplingParams(temperature=0, repetition_penalty=2.0), 0, lambda *event: None)
    for first, second, expected in ((-1.0, -1.5, 1), (1.0, 0.6, 1), (-1.0, -2.5, 0), (1.0, 0.4, 0)):
        [drawn] = Sampler(ReferenceOps()).draw(torch.tensor([[first, second]]), request.sequences).tolist()
        assert drawn == expected


def test_a_stop_id_ends_the_output_and_is_its_last_token(core):
    whole = answer(core, max_tokens=10)
    stop = whole[4]
    cut = whole[: whole.index(stop) + 1]
    assert answer(core, max_tokens=10, stop_token_ids=[stop]) == cut
    assert reason(core, max_tokens=10, stop_token_ids=[stop]) == "stop"
    assert answer(core, max_tokens=10, stop_token_ids=[stop], ignore_eos=True) == cut


def test_the_models_end_ends_the_output_unless_ignored(core):
    wish = {"logit_bias": {END: 100.0}, "max_tokens": 6}
    assert (answer(core, **wish), reason(core, **wish)) == ([END], "stop")
    assert (answer(core, **wish, ignore_eos=True), reason(core, **wish, ignore_eos=True)) == ([END] * 6, "length")


def test_no_end_before_min_tokens(core, tiny_path):
    stop = answer(core, max_tokens=3)[-1]
    wish = {"logit_bias": {END: 100.0, stop: 50.0}, "stop_token_ids": [stop], "max_tokens": 12}
    output = answer(core, **wish, min_tokens=5)
    assert len(output) == 6
    assert output[-1] == END
    banned = scores(tiny_path, output)
    banned[:5, [END, stop]] = -np.inf
    assert output[:5] == banned[:5].argmax(-1).tolist()


def test_max_tokens_and_the_context_limit(tiny_model):
    core = core_of(tiny_model, max_model_len=40)
    assert len(answer(core, max_tokens=4, ignore_eos=True)) == 4
    assert len(answer(core, max_tokens=400, ignore_eos=True)) == 10
    assert len(answer(core, ignore_eos=True)) == 10
    assert reason(core, ignore_eos=True) == "length"


def test_tokens_are_drawn_from_where_the_filters_leave_them(core, tiny_path):
    wish = {"temperature": 1.5, "max_tokens": 16, "n": 8, "ignore_eos": True}
    kept = {"top_k": 6, "top_p": 0.8, "min_p": 0.1}
    for filters in ({"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, kept):
        [request] = drive(core, [(PROMPT, SamplingParams(**wish, **filters, seed=1))]).requests
        ranks = set()
        for sequence in request.sequences:
            for row, token in zip(scores(tiny_path, sequence.output), sequence.output, strict=True):
                rank = int((row > row[token]).sum())
                ranks.add(rank)
                assert rank < allowed(row, **filters)
        assert max(ranks) > 0, "always the likeliest: nothing was drawn"


def allowed(row: np.ndarray, top_k: int = VOCAB, top_p: float = 1.0, min_p: float = 0.0) -> int:
    """How many of the likeliest tokens the filters leave, at temperature 1.5."""
    likeliest = np.sort(row / 1.5)[::-1][:top_k]
    probs = np.exp(likeliest - likeliest[0])
    probs /= probs.sum()
    by_p = 1 + int((probs.cumsum() < top_p - 1e-6).sum())
    return min(by_p, int((probs >= (min_p - 1e-6) * probs[0]).sum()))


def draw(seed: int, n: int, logits: torch.Tensor, place: int = 0) -> list[int]:
    """What the n choices of a request draw from these logits [vocab] after `place` tokens of output."""
    request = Request((1,), SamplingParams(n=n, seed=seed), seed, lambda *event: None)
    for sequence in request.sequences:
        sequence.output = [0] * place
    return Sampler(ReferenceOps()).draw(logits.expand(n, -1), request.sequences).tolist()


@pytest.mark.parametrize("vary", ["seed", "choice", "place"])
def test_draws_follow_the_distribution_whatever_varies(vary):
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -3.0])
    count = 2000
    if vary == "choice":
        tokens = draw(1, 1000, logits) + draw(2, 1000, logits)
    else:
        tokens = [draw(i if vary == "seed" else 1, 1, logits, i if vary == "place" else 0)[0] for i in range(count)]
    seen = Counter(tokens)
    for token, share in enumerate(logits.softmax(-1).tolist()):
        deviation = (count * share * (1 - share)) ** 0.5
        assert abs(seen[token] - count * share) < 4 * deviation


def test_a_seed_repeats_and_another_does_not(core):
    wish = {"temperature": 2.0, "max_tokens": 12}
    assert answer(core, **wish, seed=5) == answer(core, **wish, seed=5) != answer(core, **wish, seed=6)
    assert answer(core, **wish, seed=-1) == answer(core, **wish, seed=2**64 - 1)


def test_without_a_seed_each_request_has_its_own_and_the_engines_seed_repeats_them(tiny_model):
    wish = {"temperature": 2.0, "max_tokens": 12}
    runs = []
    for seed in (3, 3, None, None):
        core = core_of(tiny_model, seed=seed)
        runs.append((answer(core, **wish), answer(core, **wish)))
    assert runs[0] == runs[1]
    assert len({tuple(output) for run in runs[1:] for output in run}) == 6


def test_end_ids_that_the_model_has_no_logits_for_do_no_harm(tiny_model):
    strange = replace(tiny_model, eos_token_ids=(END, VOCAB + 7, -1))
    core = Core(strange, EngineConfig(max_model_len=64, num_kv_blocks=64), end_ids=[VOCAB, END])
    assert len(answer(core, logit_bias={END: 100.0}, min_tokens=3, max_tokens=8)) == 4


def test_a_request_that_cannot_be_served_says_why(tiny_model):
    core = core_of(tiny_model, max_model_len=40, max_num_seqs=4)

    def refused(prompt: list[int], match: str, **wishes) -> None:
        with pytest.raises(RequestError, match=match):
            core.request(prompt, SamplingParams(**wishes), lambda *event: None)

    refused([], "empty")
    refused([1] * 40, r"40 tokens.*limit is 39.*max_model_len=40")
    refused([1, VOCAB], f"{VOCAB} is unknown.*0 to {VOCAB - 1}")
    refused([-1], "-1 is unknown")
    refused([1], "999 is unknown", logit_bias={999: 1.0})
    refused([1], "999 is unknown", stop_token_ids=[999])
    refused([1], "n=5 exceeds max_num_seqs=4", n=5)
    core.request([1] * 39, SamplingParams(n=4), lambda *event: None)
    assert not core.has_work()
