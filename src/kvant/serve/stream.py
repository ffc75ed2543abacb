"""Server-sent events, and the end of a request whose client has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kvant.engine.outputs import Delta, Usage
from kvant.serve.deltas import total_usage
from kvant.serve.errors import envelope

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = "data: [DONE]\n\n"


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up. The body must have been read before.

    Raises:
        ClientDisconnect: it hung up.
    """
    task, watch = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Chunks as server-sent events; `deltas` is closed when the response ends, however it ends."""

    def __init__(self, deltas: AsyncGenerator[Delta, None], events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_HEADERS)
        self._deltas = deltas
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A generator that was never started does not run its own `finally`: both are closed here.
        async with aclosing(self._deltas), aclosing(self._events):
            await super().__call__(scope, receive, send)


async def stream_deltas(
    request: Request,
    deltas: AsyncGenerator[Delta, None],
    *,
    opening: Iterable[BaseModel],
    chunk: Callable[[Delta], BaseModel],
    closing: Callable[[Usage], BaseModel] | None,
) -> EventStream:
    """The response that streams `deltas`: `opening`, a chunk for each delta, `closing` with the usage, [DONE].

    Waits for the first delta, so that a request which cannot be served fails with its own HTTP status.
    """
    first = await unless_disconnected(request, _first(deltas))
    return EventStream(deltas, _events(_chained(first, deltas), opening, chunk, closing))


async def _first(deltas: AsyncGenerator[Delta, None]) -> Delta:
    return await anext(deltas)


async def _chained(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield first
    async for delta in rest:
        yield delta


async def _events(
    deltas: AsyncIterator[Delta],
    opening: Iterable[BaseModel],
    chunk: Callable[[Delta], BaseModel],
    closing: Callable[[Usage], BaseModel] | None,
) -> AsyncGenerator[str, None]:
    usages: list[Usage] = []
    try:
        for first in opening:
            yield _event(first)
        async for delta in deltas:
            usages += [delta.usage] if delta.usage else []
            yield _event(chunk(delta))
        if closing is not None:
            yield _event(closing(total_usage(usages)))
        yield DONE
    except Exception as error:  # the status line is out already: the error becomes the stream's last event
        status, reply = envelope(error)
        if status == 500:
            logger.error("a request failed", exc_info=error)
        yield _event(reply)


def json_response(model: BaseModel) -> Response:
    """A model as a JSON body, without the fields that were not set."""
    return Response(model.model_dump_json(exclude_unset=True), media_type="application/json")


def _event(model: BaseModel) -> str:
    return f"data: {model.model_dump_json(exclude_unset=True)}\n\n"
