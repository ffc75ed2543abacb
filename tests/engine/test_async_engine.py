"""The engine for coroutines: deltas as they come, and nothing left behind by those who go away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from kvant.config import EngineConfig, SamplingParams
from kvant.engine.async_engine import AsyncEngine, _Mailroom
from kvant.engine.outputs import Delta
from kvant.engine.sequence import Request
from kvant.errors import EngineDeadError, RequestError
from tests.engine.drive import eventually, reasons, spy_on_requests, text

pytestmark = pytest.mark.usefixtures("single_thread")

ENDLESS = SamplingParams(temperature=0, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def engine(tiny_path) -> Iterator[AsyncEngine]:
    config = EngineConfig(dtype="float32", max_model_len=400, num_kv_blocks=200, block_size=8, max_num_seqs=4)
    engine = AsyncEngine.from_pretrained(tiny_path, config)
    yield engine
    engine.close()


@pytest.fixture
def taken(engine, monkeypatch) -> list[Request]:
    """The requests that the engine behind takes."""
    return spy_on_requests(engine._served.engine, monkeypatch)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """In a loop of its own, within a time in which it must be done."""
    return asyncio.run(asyncio.wait_for(coroutine, 30))


async def collect(engine: AsyncEngine, prompt: Any, sampling: SamplingParams) -> list[Delta]:
    return [delta async for delta in engine.generate(prompt, sampling)]


def freed(engine: AsyncEngine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == stats.kv_blocks_used == 0


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def test_many_at_once_say_what_each_says_alone(engine):
    async def all_of_them() -> list[list[Delta]]:
        return await asyncio.gather(*(collect(engine, text(i, 10), SHORT) for i in range(12)))

    together = run(all_of_them())
    for i, deltas in enumerate(together):
        assert tokens(deltas) == tokens(run(collect(engine, text(i, 10), SHORT)))
        assert deltas[-1].usage.completion_tokens == 8
        assert deltas[-1].finish_reason == "length"


def test_a_loop_is_woken_once_for_what_comes_together(monkeypatch):
    async def woken() -> list[int]:
        loop, calls = asyncio.get_running_loop(), []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call: calls.append(call) or wake(call))
        mailroom, boxes = _Mailroom(loop), [asyncio.Queue() for _ in range(3)]
        counts = []
        for turn in range(2):
            for number, box in enumerate(boxes * 2):
                mailroom.post(box, 10 * turn + number)
            await asyncio.sleep(0)
            assert [[box.get_nowait() for _ in range(2)] for box in boxes] == [
                [10 * turn + number, 10 * turn + number + 3] for number in range(3)
            ]
            counts.append(len(calls))
        return counts

    assert run(woken()) == [1, 2]


def test_a_closed_loop_is_told_nothing():
    loop = asyncio.new_event_loop()
    mailroom, box = _Mailroom(loop), asyncio.Queue()
    loop.close()
    mailroom.post(box, 1)
    mailroom.post(box, 2)
    assert box.empty()


def test_a_cancelled_task_frees_what_it_held_whether_it_runs_or_waits(engine, taken):
    async def cancel() -> None:
        tasks = [asyncio.create_task(collect(engine, text(i, 30), ENDLESS)) for i in range(8)]
        while not (engine.stats().running == 4 and engine.stats().waiting == 4):
            await asyncio.sleep(0.002)
        for task in tasks:
            task.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))

    run(cancel())
    eventually(lambda: freed(engine))
    assert reasons(taken) == ["abort"] * 8
    assert len(tokens(run(collect(engine, text(1, 5), SHORT)))) == 8


def test_a_closed_generator_frees_what_it_held(engine, taken):
    async def read_one() -> Delta:
        async with aclosing(engine.generate(text(1, 30), ENDLESS)) as deltas:
            async for delta in deltas:
                return delta
        raise AssertionError("nothing came")

    assert run(read_one()).token_ids
    eventually(lambda: freed(engine))
    assert reasons(taken) == ["abort"]


def test_a_stop_string_ends_one_choice_in_the_engine_and_leaves_the_others(engine, taken):
    def say(index: int, deltas: list[Delta]) -> str:
        return "".join(delta.text for delta in deltas if delta.index == index)

    wish = SamplingParams(seed=1, n=2, max_tokens=300, ignore_eos=True)
    whole = run(collect(engine, text(1, 30), wish))
    texts = [say(index, whole) for index in range(2)]
    stop = next(texts[0][i : i + 3] for i in range(5, 99) if texts[0][i : i + 3] not in texts[1])
    deltas = run(collect(engine, text(1, 30), replace(wish, stop=stop)))
    assert [say(index, deltas) for index in range(2)] == [texts[0][: texts[0].index(stop)], texts[1]]
    ends = {delta.index: delta.finish_reason for delta in deltas if delta.finish_reason}
    assert ends == {0: "stop", 1: "length"}
    eventually(lambda: freed(engine))
    assert reasons(taken) == ["length", "length", "abort", "length"]


def test_a_prompt_that_cannot_be_served_is_refused_before_anything_comes(engine):
    for prompt, match in (([1] * 400, "399"), ([99999], "99999"), ([], "prompt")):
        with pytest.raises(RequestError, match=match):
            run(collect(engine, prompt, SHORT))
    assert freed(engine)


def test_those_who_listen_learn_that_the_engine_died(engine, monkeypatch):
    def failing(plan: Any) -> None:
        raise RuntimeError("boom")

    async def both() -> list[Any]:
        tasks = [asyncio.create_task(collect(engine, text(i, 10), ENDLESS)) for i in range(2)]
        while not engine.stats().running:
            await asyncio.sleep(0.002)
        monkeypatch.setattr(engine._served.engine.core._runner, "launch", failing)
        return await asyncio.gather(*tasks, return_exceptions=True)

    for error in run(both()):
        assert isinstance(error, EngineDeadError)
        assert "boom" in str(error)
    assert not engine.stats().healthy
    with pytest.raises(EngineDeadError, match="boom"):
        run(collect(engine, text(1, 5), SHORT))


def test_closing_ends_those_who_listen(engine):
    async def close_midway() -> None:
        task = asyncio.create_task(collect(engine, text(1, 10), ENDLESS))
        while not engine.stats().running:
            await asyncio.sleep(0.002)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineDeadError, match="closed"):
            await task

    run(close_midway())


def test_a_loop_that_is_gone_harms_nobody(engine):
    async def walk_away() -> None:
        deltas = engine.generate(text(1, 10), ENDLESS)
        await anext(deltas)
        engine._left = deltas  # type: ignore[attr-defined]  # kept from being closed with the loop

    loop = asyncio.new_event_loop()
    loop.run_until_complete(walk_away())
    loop.close()
    assert len(tokens(run(collect(engine, text(2, 10), SHORT)))) == 8
    eventually(lambda: freed(engine))
    assert engine.stats().healthy
    del engine._left  # type: ignore[attr-defined]


def test_what_it_shows_of_the_model(engine, tiny_path):
    assert engine.model_name == str(tiny_path)
    assert engine.max_model_len == 400
    assert engine.memory.tokens == 1600
    assert engine.encode("hi") == engine.tokenizer.encode("hi")
    assert engine.default_sampling == SamplingParams()
