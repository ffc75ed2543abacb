"""What every route needs: the engine, the names it is served under, and the head of a reply."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from kvant.engine.outputs import Delta, FinishReason, Usage
from kvant.errors import EngineDeadError
from kvant.serve.errors import ApiError
from kvant.serve.schema import ModelCard, PromptTokensDetails, UsageReply

if TYPE_CHECKING:
    from kvant.engine.async_engine import AsyncEngine
    from kvant.engine.inputs import Prompt


@dataclass(frozen=True)
class Served:
    """One engine behind one or several model names; the first is the one replies carry."""

    engine: AsyncEngine
    names: tuple[str, ...]
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str | None) -> None:
        """Refuse (404) a model that is not served here."""
        if name is not None and name not in self.names:
            known = ", ".join(self.names)
            message = f"the model {name!r} is not served here; there is: {known}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def encode(self, prompt: Prompt, **template_kwargs: Any) -> list[int]:
        """`engine.encode` in a thread: a long text would hold up all other requests."""
        return await asyncio.to_thread(self.engine.encode, prompt, **template_kwargs)

    def card(self, name: str) -> ModelCard:
        """A model's entry in /v1/models."""
        return ModelCard(id=name, created=self.created, max_model_len=self.engine.max_model_len)


def _served(request: Request) -> Served:
    served: Served = request.app.state.served
    return served


ServedHere = Annotated[Served, Depends(_served)]


@dataclass(frozen=True)
class Head:
    """What all chunks of a reply share."""

    id: str
    created: int
    model: str

    @classmethod
    def new(cls, prefix: str, model: str) -> Head:
        """A head of its own for a request that came now."""
        return cls(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), model)


def usage_reply(usage: Usage) -> UsageReply:
    """Token counts as OpenAI writes them."""
    return UsageReply(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
    )


def finish_reason(delta: Delta) -> FinishReason | None:
    """The delta's own. A choice that was cut off is an error, not an answer.

    Raises:
        EngineDeadError: the engine aborted the request.
    """
    if delta.finish_reason == "abort":
        raise EngineDeadError("the server stopped before the answer was complete; send the request again")
    return delta.finish_reason
