"""From request fields to `SamplingParams`."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvant.config import SamplingParams
from kvant.serve.sampling import chat_sampling, completion_sampling
from kvant.serve.schema import ChatRequest, CompletionRequest

DEFAULT = SamplingParams(temperature=0.25, top_k=7, stop_token_ids=(2,))
HELLO = [{"role": "user", "content": "hi"}]


def chat(**fields: object) -> SamplingParams:
    return chat_sampling(ChatRequest.model_validate({"messages": HELLO, **fields}), DEFAULT)


def completion(**fields: object) -> SamplingParams:
    return completion_sampling(CompletionRequest.model_validate({"prompt": "a", **fields}), DEFAULT)


def test_what_is_left_out_or_null_is_the_models_default():
    assert chat() == DEFAULT
    assert chat(temperature=None, top_k=None, stop=None, n=None) == DEFAULT


def test_every_field_arrives():
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.75,
        "min_p": 0.125,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "seed": 42,
        "ignore_eos": True,
        "max_tokens": 9,
        "min_tokens": 4,
    }
    both = {**fields, "logit_bias": {"5": -100}, "stop": ["a", "b"], "stop_token_ids": [4]}
    expected = SamplingParams(**fields, logit_bias={5: -100.0}, stop=("a", "b"), stop_token_ids=(2, 4))
    assert chat(**both) == expected
    assert completion(**both) == expected


def test_the_two_names_of_the_output_limit():
    assert chat(max_tokens=3).max_tokens == 3
    assert chat(max_completion_tokens=4).max_tokens == 4
    assert chat(max_tokens=3, max_completion_tokens=4).max_tokens == 4
    assert chat().max_tokens is None


def test_logprobs_of_chats():
    assert chat(logprobs=True, top_logprobs=5).logprobs == 5
    assert chat(logprobs=True).logprobs == 0
    assert chat(logprobs=False, top_logprobs=0).logprobs is None


def test_logprobs_of_completions_cover_the_prompt_only_when_it_is_echoed():
    assert (completion(logprobs=0).logprobs, completion(logprobs=0).prompt_logprobs) == (0, None)
    scored = completion(logprobs=1, echo=True, max_tokens=0)
    assert (scored.logprobs, scored.prompt_logprobs, scored.max_tokens) == (1, 1, 1)


@given(st.floats(0, 2), st.integers(1, 10**6), st.integers(-(2**63), 2**63 - 1))
def test_numbers_are_taken_as_they_are(temperature, limit, seed):
    taken = chat(temperature=temperature, max_completion_tokens=limit, seed=seed)
    assert (taken.temperature, taken.max_tokens, taken.seed) == (temperature, limit, seed)
