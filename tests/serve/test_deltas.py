"""Interleaving, joining and counting deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvant.engine.outputs import Delta, Usage
from kvant.serve.deltas import by_choice, collect, interleave, total_usage


async def words(text: str, closed: list[str]) -> AsyncGenerator[Delta, None]:
    try:
        for word in text.split():
            await asyncio.sleep(0)
            if word == "FAIL":
                raise ValueError("failed")
            yield Delta(0, word, (len(word),))
    finally:
        closed.append(text)


@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=5).map(" ".join), min_size=1, max_size=5))
def test_interleaving_keeps_each_stream_whole_and_in_order(texts):
    closed: list[str] = []
    deltas = asyncio.run(collect(interleave([words(text, closed) for text in texts], 3)))
    joined = {delta.index: delta.text for delta in by_choice(deltas)}
    assert joined == {3 * index: text.replace(" ", "") for index, text in enumerate(texts) if text}
    assert sorted(closed) == sorted(texts)


def test_closing_closes_every_stream():
    closed: list[str] = []

    async def leave_early() -> None:
        stream = interleave([words("a b", closed), words("c d", closed)], 1)
        await anext(stream)
        await stream.aclose()

    asyncio.run(leave_early())
    assert sorted(closed) == ["a b", "c d"]


def test_the_first_failure_ends_all():
    closed: list[str] = []
    with pytest.raises(ValueError, match="failed"):
        asyncio.run(collect(interleave([words("a FAIL b", closed), words("c " * 50, closed)], 1)))
    assert len(closed) == 2


def test_joining_takes_the_ending_from_the_last():
    pieces = [Delta(1, "a", (1,), ()), Delta(0, "x", (9,)), Delta(1, "b", (2, 3), (), "stop", Usage(5, 3))]
    first, second = by_choice(pieces)
    assert (first.text, first.logprobs, first.finish_reason) == ("x", None, None)
    assert (second.text, second.token_ids, second.logprobs, second.finish_reason) == ("ab", (1, 2, 3), (), "stop")


def test_usages_add_up():
    assert total_usage([Usage(1, 2, 1), None, Usage(3, 4)]) == Usage(4, 6, 1)
