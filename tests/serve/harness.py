"""The application behind a real uvicorn on a loopback port, with an engine that only pretends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import openai
import uvicorn
from fastapi import FastAPI

from kvant.config import SamplingParams
from kvant.engine.outputs import Delta, Timings, TokenLogprobs, Usage
from kvant.errors import EngineDeadError, RequestError
from kvant.serve.app import create_app
from kvant.serve.server import bind, url
from kvant.text.chat import render_chat
from kvant.text.template import ChatTemplate

MAX_MODEL_LEN = 1000
TEMPLATE = ChatTemplate("{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}")


class ByteTokenizer:
    """One token a byte; the byte 1 begins texts and is no part of them."""

    leading_spaces = 0

    def is_special(self, token: int) -> bool:
        return token == 1

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != 1).decode(errors="replace")


class FakeEngine:
    """Says `answer` byte by byte, with `AsyncEngine`'s interface; `running` counts what was not freed."""

    def __init__(self, answer: str = "héllo wörld", pace: float = 0.0) -> None:
        self.model_name = "fake"
        self.tokenizer = ByteTokenizer()
        self.max_model_len = MAX_MODEL_LEN
        self.default_sampling = SamplingParams(temperature=0.25, top_k=7)
        self.answer = answer
        self.pace = pace
        self.healthy = True
        self.dies_after: int | None = None
        self.running = 0
        self.seen: list[tuple[Any, SamplingParams]] = []
        self.template_options: list[dict[str, Any]] = []

    def stats(self) -> SimpleNamespace:
        return SimpleNamespace(running=self.running, healthy=self.healthy)

    def encode(self, prompt: Any, **options: Any) -> list[int]:
        if prompt and not isinstance(prompt, str) and isinstance(prompt[0], dict):
            self.template_options.append(options)
            prompt = render_chat(TEMPLATE, prompt, **options)
        ids = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
        if not 0 < len(ids) < MAX_MODEL_LEN:
            raise RequestError(f"the prompt has {len(ids)} tokens; it must have 1 to {MAX_MODEL_LEN - 1}")
        return ids

    async def generate(
        self, prompt: Any, sampling: SamplingParams, *, continues: bool | None = None
    ) -> AsyncIterator[Delta]:
        if any(token > 255 for token in sampling.stop_token_ids):
            raise RequestError("stop_token_ids: unknown token")
        self.seen.append((prompt, sampling))
        self.running += 1
        try:
            async for delta in self._say(self.encode(prompt), sampling):
                yield delta
        finally:
            self.running -= 1

    async def _say(self, prompt: list[int], sampling: SamplingParams) -> AsyncIterator[Delta]:
        said = self.answer.encode()[: sampling.max_tokens]
        reason = "stop" if len(said) == len(self.answer.encode()) else "length"
        usage = Usage(len(prompt), len(said) * sampling.n, cached_tokens=len(prompt) // 2)
        for place, byte in enumerate(said):
            for index in range(sampling.n):
                await asyncio.sleep(self.pace)
                if self.dies_after == place:
                    raise EngineDeadError("the engine died")
                delta = Delta(index, _text(said, place), (byte,), self._logprobs(byte, sampling))
                if place == index == 0 and sampling.prompt_logprobs is not None:
                    delta = replace(delta, prompt_logprobs=_prompt_logprobs(prompt))
                if place == len(said) - 1:
                    delta = replace(delta, finish_reason=reason)
                    if index == sampling.n - 1:
                        delta = replace(delta, usage=usage, timings=Timings(0, 0, 1, 1))
                yield delta

    def _logprobs(self, byte: int, sampling: SamplingParams) -> tuple[TokenLogprobs, ...] | None:
        if sampling.logprobs is None:
            return None
        top = ((120, -0.25), (byte, -0.5), (121, float("-inf")))
        return (TokenLogprobs(byte, -0.5, 2, top[: sampling.logprobs]),)


def _text(said: bytes, place: int) -> str:
    """What the byte adds to the text: a character when it completes one."""
    return said[: place + 1].decode(errors="ignore")[len(said[:place].decode(errors="ignore")) :]


def _prompt_logprobs(prompt: list[int]) -> tuple[TokenLogprobs | None, ...]:
    return (None, *(TokenLogprobs(token, -1.0, 1, ((token, -1.0),)) for token in prompt[1:]))


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The application on a free loopback port; gives its URL."""
    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    eventually(lambda: server.started)
    try:
        yield url(bound)
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        assert not thread.is_alive()


def eventually(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until a condition holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@dataclass(frozen=True)
class Running:
    """A server, its engine and a client of it."""

    engine: FakeEngine
    url: str
    client: openai.OpenAI

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def wait_until_freed(self) -> None:
        """Return once the engine holds no request, or fail."""
        eventually(lambda: self.engine.running == 0)


@contextmanager
def fake_server(
    engine: FakeEngine | None = None, names: Sequence[str] = (), key: str | None = None, **options: Any
) -> Iterator[Running]:
    """A server with an engine of its own, or the one given."""
    engine = engine or FakeEngine()
    with serving(create_app(engine, names, key, **options)) as base:
        yield Running(engine, base, openai.OpenAI(base_url=f"{base}/v1", api_key=key or "unused", max_retries=0))
