"""POST /v1/completions: texts or token ids continued, or scored with echo and logprobs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvant.engine.outputs import Delta, TokenLogprobs, Usage
from kvant.serve.deltas import by_choice, collect, interleave, total_usage
from kvant.serve.errors import ApiError
from kvant.serve.logprobs import CompletionLogprobsWriter
from kvant.serve.sampling import completion_sampling, scores_only
from kvant.serve.schema import CompletionChoice, CompletionLogprobs, CompletionReply, CompletionRequest
from kvant.serve.served import Head, Served, ServedHere, finish_reason, usage_reply
from kvant.serve.stream import json_response, stream_deltas, unless_disconnected
from kvant.text.tokenizer import Tokenizer

MAX_COMPLETIONS = 2048

router = APIRouter()


@router.post("/v1/completions", response_model=CompletionReply)
async def create_completion(body: CompletionRequest, request: Request, served: ServedHere) -> Response:
    """Continue each prompt n times, whole or as a stream of chunks."""
    served.check_model(body.model)
    sampling = completion_sampling(body, served.engine.default_sampling)
    if len(body.prompts) * sampling.n > MAX_COMPLETIONS:
        message = (
            f"{len(body.prompts)} prompts x n={sampling.n} are more than {MAX_COMPLETIONS} completions; send fewer"
        )
        raise ApiError(400, message, param="prompt")
    prompts = await asyncio.gather(*(encoded(prompt, served) for prompt in body.prompts))
    writer = CompletionWriter(
        Head.new("cmpl", body.model or served.names[0]), body, sampling.n, prompts, served.engine.tokenizer
    )
    deltas = interleave(
        [served.engine.generate(prompt.ids, sampling, continues=True) for prompt in prompts], sampling.n
    )
    if not body.stream:
        return json_response(writer.whole(await unless_disconnected(request, collect(deltas))))
    closing = writer.usage_chunk if body.include_usage else None
    return await stream_deltas(request, deltas, opening=[], chunk=writer.chunk, closing=closing)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the engine reads it, and as `echo` repeats it."""

    ids: list[int]
    text: str


async def encoded(prompt: str | list[int], served: Served) -> EncodedPrompt:
    """A prompt from either of its forms."""
    ids = await served.encode(prompt)
    return EncodedPrompt(ids, prompt if isinstance(prompt, str) else served.engine.tokenizer.decode(ids))


class CompletionWriter:
    """Deltas in, chunks or a whole completion out. It remembers which choices have begun, for `echo` and offsets."""

    def __init__(
        self, head: Head, request: CompletionRequest, n: int, prompts: list[EncodedPrompt], tokenizer: Tokenizer
    ) -> None:
        self._head = head
        self._echo = request.echo
        self._scores = request.logprobs is not None
        self._scores_only = scores_only(request)
        self._n = n
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._writers: dict[int, CompletionLogprobsWriter] = {}
        self._prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] = {}

    def chunk(self, delta: Delta) -> CompletionReply:
        """One delta as a chunk."""
        return self._reply([self._choice(delta)])

    def usage_chunk(self, usage: Usage) -> CompletionReply:
        """The chunk after the last one, which only counts."""
        return self._reply([], usage)

    def whole(self, deltas: list[Delta]) -> CompletionReply:
        """All deltas of a request as its completion."""
        choices = [self._choice(delta) for delta in by_choice(deltas)]
        return self._reply(choices, total_usage(delta.usage for delta in deltas))

    def _reply(self, choices: list[CompletionChoice], usage: Usage | None = None) -> CompletionReply:
        head = self._head
        reply = CompletionReply(
            id=head.id, object="text_completion", created=head.created, model=head.model, choices=choices
        )
        if usage is not None:
            counted = replace(usage, completion_tokens=0) if self._scores_only else usage
            reply.usage = usage_reply(counted)
        return reply

    def _choice(self, delta: Delta) -> CompletionChoice:
        if self._scores_only:
            delta = _without_output(delta)
        text, logprobs = self._begun(delta)
        reason = finish_reason(delta)
        return CompletionChoice(index=delta.index, text=text, logprobs=logprobs, finish_reason=reason)

    def _begun(self, delta: Delta) -> tuple[str, CompletionLogprobs | None]:
        """Text and logprobs of a delta, after those of the prompt where it is to be echoed and has not been yet."""
        prompt_index = delta.index // self._n
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs[prompt_index] = delta.prompt_logprobs
        prompt = self._prompts[prompt_index] if self._echo and delta.index not in self._writers else None
        writer = self._writers.setdefault(delta.index, CompletionLogprobsWriter(self._tokenizer))
        text = delta.text if prompt is None else prompt.text + delta.text
        if not self._scores:
            return text, None
        before = writer.write(prompt.ids, self._prompt_logprobs[prompt_index], prompt.text) if prompt else None
        here = writer.write(delta.token_ids, delta.logprobs or ())
        return text, here if before is None else _concatenated(before, here)


def _concatenated(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def _without_output(delta: Delta) -> Delta:
    reason = "length" if delta.finish_reason == "stop" else delta.finish_reason
    return replace(delta, text="", token_ids=(), logprobs=None, finish_reason=reason)
