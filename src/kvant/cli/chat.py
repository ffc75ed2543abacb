"""`kvant chat`: talk to a model, or ask it one thing."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvant.cli.flags import ModelArgument, engine_flags, option, sampling_flags
from kvant.cli.loading import memory_fetched, meta_kernels_left_out, nothing_collected
from kvant.config import EngineConfig
from kvant.errors import RequestError

if TYPE_CHECKING:
    from kvant.pipelines import Pipeline

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
@engine_flags
@sampling_flags
def chat(
    model: ModelArgument = None,
    *,
    query: Annotated[
        str | None, typer.Option("--query", "-q", help="Ask this, print the answer and exit; '-' reads it from stdin.")
    ] = None,
    system: Annotated[str | None, option("--system", "Instructions for the model, before the conversation.")] = None,
    stats: Annotated[bool, option("--stats", "After each answer, tell speed and memory (on stderr).")] = False,
    engine: EngineConfig,
    sampling: dict[str, Any],
) -> None:
    """Talk to a model, or ask it one thing.

    \b
    kvant chat                                   a conversation with smollm2
    kvant chat model.gguf --kv-cache-dtype int4  another model, KV cache in 4 bits
    kvant chat -q "Three rivers?" --temperature 0
                                                 only the answer, on stdout
    git diff | kvant chat -q - --system "Summarize."
                                                 the question from a pipe

    In a conversation, /help tells the commands, and Ctrl-C stops an answer.
    """  # noqa: D301
    if query == "-":
        query = sys.stdin.read()
    if query is not None and not query.strip():
        raise RequestError("the question is empty; put text after -q, or pipe it in with -q -")
    with _loaded(model, engine) as pipe:
        # Imported here: it needs rich, which takes a while.
        from kvant.cli.conversation import Voice, converse

        voice = Voice(pipe.memory if stats else None)
        params = dataclasses.replace(pipe.default_sampling, **sampling)
        if query is None:
            voice.tell(f"{pipe.model_name}: /help tells the commands, /exit or Ctrl-D leaves.")
            converse(pipe.session(system, params), voice)
        else:
            voice.answer(pipe.stream(_messages(system, query), params))


def _messages(system: str | None, query: str) -> list[dict[str, str]]:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": query}]


def _loaded(model: str | None, engine: EngineConfig) -> Pipeline:
    from rich.console import Console

    with nothing_collected(), Console(stderr=True).status("loading the model and its engine"):
        with memory_fetched(_packed_bytes(model, engine)), meta_kernels_left_out():
            from kvant.pipelines import pipeline

        return pipeline(model, engine=engine)


def _packed_bytes(model: str | None, engine: EngineConfig) -> int:
    """As much memory as a .gguf file's blocks are packed into; 0 for what is packed into less, or is no file."""
    from kvant.weights.locate import DEFAULT_MODEL
    from kvant.weights.pull import PULLABLE, find_pulled

    if engine.weights != "auto" or engine.device not in ("auto", "cpu"):
        return 0
    name = model or DEFAULT_MODEL
    path = find_pulled(name) if name in PULLABLE else Path(name)
    with contextlib.suppress(OSError):  # the loader will tell of it
        return path.stat().st_size if path is not None and path.is_file() else 0
    return 0
