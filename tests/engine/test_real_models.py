"""Greedy parity with transformers on real models: alone, batched, chunked, from the prefix cache, and preempted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvant.config import EngineConfig, SamplingParams
from kvant.engine.core import Core
from kvant.engine.sequence import Request
from kvant.kernels.reference import ReferenceOps
from kvant.weights.load import LoadedModel, load_model
from kvant.weights.tokenizer import read_tokenizer
from tests.support import SingleText

QUICK = ((5, 61, 62, 63, 64, 65, 66, 400), 14)  # prompt lengths, new tokens
FULL = ((5, 9, 17, 33, 60, 64, 65, 100, 128, 200, 300, 400, 511, 700, 1000, 1500), 64)
TIE = 1e-3  # where the reference's two likeliest tokens are this close, either may be chosen
TEXT = Path(__file__).parents[1] / "data" / "truman_1945.txt"


@dataclass(frozen=True)
class Answer:
    """What transformers generates for a prompt, and how clear each choice was: the two largest logits' distance."""

    prompt: list[int]
    tokens: list[int]
    margins: list[float]
    first_logits: Tensor


@dataclass(frozen=True)
class Subject:
    """A model in kvant, and the reference's answers."""

    model: LoadedModel
    answers: list[Answer]
    new_tokens: int


def _transformers(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def _answer(reference: Any, prompt: list[int], new_tokens: int) -> Answer:
    result = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(result.logits)
    best, second = logits.topk(2).values.unbind(-1)
    return Answer(prompt, result.sequences[0, len(prompt) :].tolist(), (best - second).tolist(), logits[0])


def _subject(path: Path, lengths: Sequence[int], new_tokens: int) -> Subject:
    model = load_model(path, dtype="float32", ops=ReferenceOps())
    ids = read_tokenizer(model.source).encode(TEXT.read_text())
    prompts = [ids[17 * index : 17 * index + length] for index, length in enumerate(lengths)]
    reference = _transformers(path)
    with torch.inference_mode():
        return Subject(model, [_answer(reference, prompt, new_tokens) for prompt in prompts], new_tokens)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("smollm2", *QUICK), id="smollm2-quick"),
        pytest.param(("smollm2", *FULL), id="smollm2", marks=pytest.mark.slow),
        pytest.param(("qwen_coder", *FULL), id="qwen_coder", marks=pytest.mark.slow),
    ],
)
def subject(request: pytest.FixtureRequest) -> Subject:
    model, lengths, new_tokens = request.param
    return _subject(request.getfixturevalue(model), lengths, new_tokens)


def generate(core: Core, prompts: Sequence[list[int]], new_tokens: int) -> list[Request]:
    """All prompts at once, greedily, to the end."""
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    requests = [core.request(prompt, sampling, lambda *_: None) for prompt in prompts]
    for request in requests:
        core.add(request)
    while core.has_work():
        core.step()
    return requests


def assert_parity(subject: Subject, requests: Sequence[Request]) -> None:
    """Equal tokens up to a tie of the reference's, after which the texts may part."""
    for answer, request in zip(subject.answers, requests, strict=True):
        output = request.sequences[0].output
        assert len(output) == subject.new_tokens
        differ = next((i for i, pair in enumerate(zip(output, answer.tokens, strict=True)) if pair[0] != pair[1]), None)
        if differ is not None:
            margin = answer.margins[differ]
            assert margin < TIE, f"prompt of {len(answer.prompt)}: token {differ} differs, by a margin of {margin}"
            print(f"prompt of {len(answer.prompt)}: tie at token {differ}, margin {margin:.2g}")


def core(subject: Subject, **settings: Any) -> Core:
    settings = {"kv_cache_memory": "1GiB", "max_model_len": 2048, **settings}
    return Core(subject.model, EngineConfig(kv_cache_dtype="fp32", seed=0, **settings))


def test_logits_agree(subject: Subject) -> None:
    """The reference's logits after each prompt, to 1e-3."""
    for answer in subject.answers:
        text = SingleText(subject.model.decoder, len(answer.prompt), len(answer.prompt))
        logits = text.feed(answer.prompt)[-1]
        torch.testing.assert_close(logits, answer.first_logits, atol=1e-3, rtol=0)


def prompts(subject: Subject) -> list[list[int]]:
    return [answer.prompt for answer in subject.answers]


def test_alone(subject: Subject) -> None:
    engine = core(subject)
    assert_parity(subject, [generate(engine, [prompt], subject.new_tokens)[0] for prompt in prompts(subject)])


def test_in_one_batch(subject: Subject) -> None:
    assert_parity(subject, generate(core(subject), prompts(subject), subject.new_tokens))


def test_in_chunks_of_64(subject: Subject) -> None:
    engine = core(subject, max_num_batched_tokens=64)
    assert_parity(subject, generate(engine, prompts(subject), subject.new_tokens))


def test_repeats_come_from_the_prefix_cache(subject: Subject) -> None:
    engine = core(subject)
    first = generate(engine, prompts(subject), subject.new_tokens)
    again = generate(engine, prompts(subject), subject.new_tokens)
    assert_parity(subject, first)
    assert [r.sequences[0].output for r in again] == [r.sequences[0].output for r in first]
    assert [r.cached_tokens for r in again] == [len(prompt) - 1 for prompt in prompts(subject)]


def test_preempted(subject: Subject) -> None:
    """The pool holds the longest text and hardly more."""
    longest = max(map(len, prompts(subject))) + subject.new_tokens
    tight = longest // 16 + 1
    engine = core(subject, kv_cache_memory=None, num_kv_blocks=tight, max_model_len=longest, block_size=16)
    requests = generate(engine, prompts(subject), subject.new_tokens)
    assert engine.stats().preemptions > 0
    assert_parity(subject, requests)
