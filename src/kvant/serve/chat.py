"""POST /v1/chat/completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvant.engine.outputs import Delta, Usage
from kvant.serve.deltas import by_choice, collect, total_usage
from kvant.serve.logprobs import chat_logprobs
from kvant.serve.sampling import chat_sampling
from kvant.serve.schema import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatMessage,
    ChatReply,
    ChatRequest,
)
from kvant.serve.served import Head, ServedHere, finish_reason, usage_reply
from kvant.serve.stream import json_response, stream_deltas, unless_disconnected
from kvant.text.tokenizer import Tokenizer

router = APIRouter()


@router.post("/v1/chat/completions", response_model=ChatReply)
async def create_chat_completion(body: ChatRequest, request: Request, served: ServedHere) -> Response:
    """Answer a conversation, whole or as a stream of chunks."""
    served.check_model(body.model)
    sampling = chat_sampling(body, served.engine.default_sampling)
    prompt = await served.encode(body.messages, **template_options(body))
    writer = ChatWriter(Head.new("chatcmpl", body.model or served.names[0]), served.engine.tokenizer)
    deltas = served.engine.generate(prompt, sampling)
    if not body.stream:
        return json_response(writer.whole(await unless_disconnected(request, collect(deltas))))
    closing = writer.usage_chunk if body.include_usage else None
    opening = writer.opening(sampling.n)
    return await stream_deltas(request, deltas, opening=opening, chunk=writer.chunk, closing=closing)


def template_options(body: ChatRequest) -> dict[str, Any]:
    """What the chat template gets beside the messages."""
    opens_answer = body.add_generation_prompt
    options: dict[str, Any] = {
        "add_generation_prompt": not body.continue_final_message if opens_answer is None else opens_answer,
        "continue_final_message": body.continue_final_message,
    }
    if body.reasoning_effort is not None:
        options["reasoning_effort"] = body.reasoning_effort
    return options | body.chat_template_kwargs


@dataclass(frozen=True)
class ChatWriter:
    """Deltas in, chunks or a whole completion out."""

    head: Head
    tokenizer: Tokenizer

    def opening(self, choices: int) -> list[ChatChunk]:
        """The chunks that say who speaks, before any text."""
        start = ChatMessage(role="assistant", content="")
        return [
            self._chunk([ChatChunkChoice(index=index, delta=start, logprobs=None, finish_reason=None)])
            for index in range(choices)
        ]

    def chunk(self, delta: Delta) -> ChatChunk:
        """One delta as a chunk."""
        message = ChatMessage(content=delta.text) if delta.text else ChatMessage()
        reason = finish_reason(delta)
        return self._chunk(
            [ChatChunkChoice(index=delta.index, delta=message, logprobs=self._logprobs(delta), finish_reason=reason)]
        )

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        """The chunk after the last one, which only counts."""
        return self._chunk([]).model_copy(update={"usage": usage_reply(usage)})

    def whole(self, deltas: list[Delta]) -> ChatReply:
        """All deltas of a request as its completion."""
        return ChatReply(
            id=self.head.id,
            object="chat.completion",
            created=self.head.created,
            model=self.head.model,
            choices=[self._choice(delta) for delta in by_choice(deltas)],
            usage=usage_reply(total_usage(delta.usage for delta in deltas)),
        )

    def _choice(self, delta: Delta) -> ChatChoice:
        message = ChatMessage(role="assistant", content=delta.text)
        reason = finish_reason(delta)
        return ChatChoice(index=delta.index, message=message, logprobs=self._logprobs(delta), finish_reason=reason)

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        head = self.head
        return ChatChunk(
            id=head.id, object="chat.completion.chunk", created=head.created, model=head.model, choices=choices
        )

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        return None if delta.logprobs is None else chat_logprobs(delta.logprobs, self.tokenizer)
