"""Streams of deltas: several into one, many deltas into one a choice, usages into a sum."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace

from kvant.engine.outputs import Delta, Usage


async def interleave(streams: Sequence[AsyncGenerator[Delta, None]], choices_each: int) -> AsyncGenerator[Delta, None]:
    """The deltas of several requests as they come, choice i of request r renumbered r * choices_each + i.

    Closing it closes them all; the first error of one ends it.
    """
    queue: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
    tasks = [asyncio.create_task(_forward(stream, index * choices_each, queue)) for index, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            news = await queue.get()
            if isinstance(news, Exception):
                raise news
            if news is None:
                running -= 1
            else:
                yield news
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _forward(
    stream: AsyncGenerator[Delta, None], offset: int, queue: asyncio.Queue[Delta | Exception | None]
) -> None:
    try:
        async for delta in stream:
            queue.put_nowait(replace(delta, index=delta.index + offset))
        queue.put_nowait(None)
    except Exception as error:  # handed on to the reader, whatever it is
        queue.put_nowait(error)


async def collect(stream: AsyncGenerator[Delta, None]) -> list[Delta]:
    """All deltas of a stream, which is closed whatever happens."""
    async with aclosing(stream):
        return [delta async for delta in stream]


def by_choice(deltas: Iterable[Delta]) -> list[Delta]:
    """Each choice's deltas as a single one, in the order of the choices."""
    groups: dict[int, list[Delta]] = {}
    for delta in deltas:
        groups.setdefault(delta.index, []).append(delta)
    return [_joined(groups[index]) for index in sorted(groups)]


def _joined(deltas: list[Delta]) -> Delta:
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        logprobs=tuple(entry for entries in logprobs for entry in entries) if logprobs else None,
        prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
    )


def total_usage(usages: Iterable[Usage | None]) -> Usage:
    """The sum over requests; None stands for no news."""
    known = [usage for usage in usages if usage is not None]
    return Usage(
        sum(usage.prompt_tokens for usage in known),
        sum(usage.completion_tokens for usage in known),
        sum(usage.cached_tokens for usage in known),
    )
