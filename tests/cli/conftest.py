"""The command line with a pipeline that only pretends."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from kvant.cli.main import app
from kvant.config import EngineConfig, SamplingParams
from kvant.engine.outputs import Delta, Timings, Usage
from kvant.errors import RequestError


class FakePipeline:
    """`kvant.pipelines.Pipeline`'s interface, as far as the command line uses it; it repeats what it is told.

    "too long" and "interrupt" do what they say.
    """

    def __init__(self, model: str | None, engine: EngineConfig) -> None:
        self.model, self.engine = model, engine
        self.model_name = model or "smollm2"
        self.default_sampling = SamplingParams(temperature=0.25, top_k=7)
        self.memory = SimpleNamespace(describe=lambda: "KV cache int4: 1 MiB")
        self.asked: list[tuple[list[dict[str, str]], SamplingParams]] = []
        self.sessions: list[FakeSession] = []
        self.closed_streams = 0
        self.closed = False

    def stream(self, messages: list[dict[str, str]], sampling: SamplingParams) -> Iterator[Delta]:
        self.asked.append((messages, sampling))
        text = messages[-1]["content"]
        if text == "too long":
            raise RequestError("the prompt has 9000 tokens")
        try:
            yield Delta(0, f"{len(messages)}:", (1,))
            if text == "interrupt":
                raise KeyboardInterrupt
            yield Delta(0, text, (2,), finish_reason="stop", usage=Usage(7, 2, 3), timings=Timings(0, 0.25, 1, 2.5))
        finally:
            self.closed_streams += 1

    def session(self, system: str | None = None, sampling: SamplingParams | None = None) -> FakeSession:
        self.sessions.append(FakeSession(self, system, sampling))
        return self.sessions[-1]

    def __enter__(self) -> FakePipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


class FakeSession:
    """Remembers what it was told, and nothing of what it said."""

    def __init__(self, pipe: FakePipeline, system: str | None, sampling: SamplingParams) -> None:
        self.pipe, self.system, self.sampling = pipe, system, sampling
        self.heard: list[str] = []

    def stream(self, text: str) -> Iterator[Delta]:
        self.heard.append(text)
        return self.pipe.stream([{"role": "user", "content": said} for said in self.heard], self.sampling)

    def reset(self) -> None:
        self.heard.clear()


@pytest.fixture
def pipes(monkeypatch: pytest.MonkeyPatch) -> list[FakePipeline]:
    """The pipelines that the command made, in the place of real ones."""
    made: list[FakePipeline] = []

    def pipeline(model: str | None = None, *, engine: EngineConfig) -> FakePipeline:
        made.append(FakePipeline(model, engine))
        return made[-1]

    module = ModuleType("kvant.pipelines")
    module.pipeline = pipeline
    monkeypatch.setitem(sys.modules, "kvant.pipelines", module)
    return made


@pytest.fixture
def kvant() -> Callable[..., Result]:
    """Run the command in this process: `kvant("chat", "-q", "hi", input=..., env=...)`."""

    def run(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(app, list(arguments), **options)

    return run
