"""The engine for asyncio: one async generator a request."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from kvant.config import EngineConfig, SamplingParams
from kvant.engine.build import Front, ServedModel, serve_model
from kvant.engine.deltas import DeltaBuilder
from kvant.engine.inputs import Prompt
from kvant.engine.outputs import Delta
from kvant.engine.sequence import Failure, Request, TokenEvent

_Event = TokenEvent | Failure
_Events = asyncio.Queue[_Event]


class _Mailroom:
    """Brings the engine's events to an event loop, a step's at once: waking it takes longer than an event."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._mail: deque[tuple[_Events, _Event]] = deque()
        self._called = False

    def post(self, events: _Events, event: _Event) -> None:
        """Put an event in a queue of the loop, soon. From the engine's thread."""
        self._mail.append((events, event))
        if not self._called:
            self._called = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self._mail.clear()
                self._called = False

    def _deliver(self) -> None:
        self._called = False  # before it looks: what comes later calls again
        while self._mail:
            events, event = self._mail.popleft()
            events.put_nowait(event)


class AsyncEngine(Front):
    """A model served to coroutines. Use one from a single event loop at a time, and `close()` it."""

    def __init__(self, served: ServedModel) -> None:
        super().__init__(served)
        self._mail: _Mailroom | None = None

    @classmethod
    def from_pretrained(cls, model: str | Path | None = None, config: EngineConfig | None = None) -> AsyncEngine:
        """Load a model and start its engine; blocks until it is ready."""
        return cls(serve_model(model, config or EngineConfig()))

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    @property
    def default_sampling(self) -> SamplingParams:
        """What the checkpoint recommends."""
        return self._served.default_sampling

    def encode(self, prompt: Prompt, **template_kwargs: Any) -> list[int]:
        """The token ids of a prompt; raises RequestError where it is none."""
        return self._served.encode(prompt, **template_kwargs)

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, continues: bool | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Deltas of one request as they come. Closing the generator, or cancelling its task, aborts the request.

        Args:
            prompt: a text, chat messages or token ids.
            sampling: None takes the checkpoint's recommendation.
            continues: the answer goes on from the prompt's text, so that a leading space belongs to it; None means
                so for a text.

        Raises:
            RequestError: before the first delta, for a prompt that cannot be served.
            EngineDeadError: the engine is closed or has failed.
        """
        events: _Events = asyncio.Queue()
        mailroom = self._mailroom()

        def sink(_: Request, event: _Event) -> None:
            mailroom.post(events, event)

        engine = self._served.engine
        ids = self._served.encode(prompt)
        request = engine.submit(ids, sampling or self.default_sampling, sink)
        goes_on = isinstance(prompt, str) if continues is None else continues
        builder = DeltaBuilder(request, self.tokenizer, goes_on)
        try:
            while not builder.finished:
                event = await events.get()
                if isinstance(event, Failure):
                    raise event.error
                delta = builder.push(event)
                if builder.stopped_early(event):
                    engine.abort(request, event.index)
                if delta is not None:
                    yield delta
        finally:
            engine.abort(request)

    def _mailroom(self) -> _Mailroom:
        """That of the loop which asks; requests of another one keep theirs."""
        loop = asyncio.get_running_loop()
        if self._mail is None or self._mail.loop is not loop:
            self._mail = _Mailroom(loop)
        return self._mail
