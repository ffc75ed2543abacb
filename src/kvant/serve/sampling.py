"""From a request's fields to `SamplingParams`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from kvant.config import SamplingParams
from kvant.serve.schema import ChatRequest, CompletionRequest, GenerationRequest

# OpenAI's default for /v1/completions, where a text has no natural end.
DEFAULT_COMPLETION_TOKENS = 16

_SAME_NAME = {field.name for field in fields(SamplingParams)} - {"logprobs", "prompt_logprobs"}


def chat_sampling(request: ChatRequest, default: SamplingParams) -> SamplingParams:
    """The sampling of a chat request; `default` fills in what it leaves open.

    Raises:
        ConfigError: a value is out of its range.
    """
    given = _given(request)
    if request.max_completion_tokens is not None:
        given["max_tokens"] = request.max_completion_tokens
    if request.logprobs:
        given["logprobs"] = request.top_logprobs or 0
    return _merged(default, given)


def completion_sampling(request: CompletionRequest, default: SamplingParams) -> SamplingParams:
    """The same for a completion. To only score a prompt (max_tokens=0) takes one token, which is then not shown."""
    given = _given(request)
    if scores_only(request):
        given["max_tokens"] = 1
    if default.max_tokens is None:
        given.setdefault("max_tokens", DEFAULT_COMPLETION_TOKENS)
    if request.logprobs is not None:
        given["logprobs"] = request.logprobs
        given["prompt_logprobs"] = request.logprobs if request.echo else None
    return _merged(default, given)


def scores_only(request: CompletionRequest) -> bool:
    """Whether the prompt is to be echoed and nothing generated."""
    return request.echo and request.max_tokens == 0


def _given(request: GenerationRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in _SAME_NAME & request.model_fields_set}


def _merged(default: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    if "stop_token_ids" in given:
        given["stop_token_ids"] = (*(default.stop_token_ids or ()), *given["stop_token_ids"])
    return replace(default, **given)
