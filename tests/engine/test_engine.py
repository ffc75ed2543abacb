"""The engine's thread: events in order, everything freed, and nobody left waiting when it dies."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from kvant.config import SamplingParams
from kvant.engine.core import Core
from kvant.engine.engine import Engine
from kvant.engine.sequence import Failure, Request, TokenEvent
from kvant.errors import EngineDeadError, RequestError
from tests.engine.drive import core_of, drive_alone, eventually, text

pytestmark = pytest.mark.usefixtures("single_thread")

SECONDS = 20
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5)


class Listener:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self._events: queue.Queue[TokenEvent | Failure] = queue.Queue()

    def __call__(self, request: Request, event: TokenEvent | Failure) -> None:
        self._events.put(event)

    def next(self) -> TokenEvent | Failure:
        return self._events.get(timeout=SECONDS)

    def nothing_more(self) -> bool:
        return self._events.empty()

    def all(self, choices: int = 1) -> list[TokenEvent | Failure]:
        """Everything up to the end of that many choices, or the engine's."""
        events: list[TokenEvent | Failure] = []
        while choices:
            events.append(self.next())
            if isinstance(events[-1], Failure):
                return events
            choices -= events[-1].finish_reason is not None
        return events


@pytest.fixture
def core(tiny_model) -> Core:
    return core_of(tiny_model, max_num_seqs=4)


@pytest.fixture
def engine(core) -> Iterator[Engine]:
    engine = Engine(core)
    yield engine
    closer = threading.Thread(target=engine.close, daemon=True)
    closer.start()
    closer.join(SECONDS)
    assert not closer.is_alive(), "close() hangs"


def submit(
    engine: Engine, sampling: SamplingParams = ENDLESS, prompt: list[int] | None = None
) -> tuple[Request, Listener]:
    listener = Listener()
    return engine.submit(prompt or text(1, 20), sampling, listener), listener


def idle(engine: Engine) -> bool:
    stats = engine.stats()
    return stats.running == stats.waiting == stats.kv_blocks_used == 0


def test_each_requests_events_come_in_order_and_end(engine, tiny_model):
    asks = [(text(i, 5 + 7 * i), SamplingParams(temperature=1.0, seed=i, n=1 + i % 3, max_tokens=6)) for i in range(10)]
    expected = drive_alone(tiny_model, asks).outputs
    listeners: dict[int, Listener] = {}

    def client(numbers: range) -> None:
        for i in numbers:
            listeners[i] = Listener()
            engine.submit(*asks[i], listeners[i])

    threads = [threading.Thread(target=client, args=(range(start, 10, 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (_, sampling) in enumerate(asks):
        events = listeners[i].all(sampling.n)
        for choice in range(sampling.n):
            mine = [event for event in events if event.index == choice]
            assert [event.token_id for event in mine] == expected[i][choice]
            assert [event.finish_reason for event in mine[:-1]] == [None] * (len(mine) - 1)
            assert [event.time for event in mine] == sorted(event.time for event in mine)
    eventually(lambda: idle(engine))
    assert engine.stats().healthy


def test_an_aborted_request_is_told_and_frees_everything(engine):
    running, listener = submit(engine)
    listener.next()
    engine.abort(running)
    assert listener.all()[-1].finish_reason == "abort"
    eventually(lambda: idle(engine))
    engine.abort(running)
    assert submit(engine, SHORT)[1].all()[-1].finish_reason == "length"


def test_a_request_is_aborted_while_it_waits(engine):
    first = [submit(engine) for _ in range(4)]
    for _, listener in first:
        listener.next()
    waiting, listener = submit(engine, SamplingParams(n=4))
    eventually(lambda: engine.stats().waiting == 4)
    engine.abort(waiting)
    assert [event.finish_reason for event in listener.all(4)] == ["abort"] * 4
    for request, _ in first:
        engine.abort(request)
    eventually(lambda: idle(engine))


def test_one_choice_is_aborted_and_the_others_go_on(engine):
    request, listener = submit(engine, SamplingParams(temperature=0, n=3, max_tokens=30, ignore_eos=True))
    listener.next()
    engine.abort(request, 1)
    ends = [event for event in listener.all(3) if event.finish_reason]
    assert sorted((event.index, event.finish_reason) for event in ends) == [(0, "length"), (1, "abort"), (2, "length")]


def test_what_cannot_be_served_is_refused_at_once_and_harms_nobody(engine):
    with pytest.raises(RequestError, match="empty"):
        engine.submit([], SHORT, Listener())
    assert len(submit(engine, SHORT)[1].all()) == 5


def test_closing_tells_those_who_run_and_those_who_wait(engine):
    _, finished = submit(engine, SHORT)
    assert len(finished.all()) == 5
    listeners = [submit(engine)[1] for _ in range(6)]
    listeners[0].next()
    engine.close()
    assert finished.nothing_more()
    for listener in listeners:
        assert listener.all()[-1].message == "the engine is closed"
    assert not engine.stats().healthy
    with pytest.raises(EngineDeadError, match="the engine is closed; create a new one"):
        submit(engine)
    engine.close()


def test_nobody_slips_in_unseen_while_it_closes(engine):
    listeners: list[Listener] = []

    def client() -> None:
        while True:
            try:
                listeners.append(submit(engine, SHORT)[1])
            except EngineDeadError:
                return

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(listeners) > 30)
    engine.close()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()
    for listener in listeners:
        last = listener.all()[-1]
        assert isinstance(last, Failure) or last.finish_reason == "length"


def test_a_fault_ends_all_requests_with_its_cause(core, engine, monkeypatch, caplog):
    all_submitted = threading.Event()
    monkeypatch.setattr(core._runner, "launch", lambda plan: all_submitted.wait(SECONDS) and 1 / 0)
    listeners = [submit(engine)[1] for _ in range(6)]
    all_submitted.set()
    for listener in listeners:
        assert listener.all()[-1].message == "the engine failed: ZeroDivisionError: division by zero"
    assert not engine.stats().healthy
    with pytest.raises(EngineDeadError, match="the engine failed: ZeroDivisionError: .*; create a new one"):
        submit(engine)
    assert "division by zero" in caplog.text


def test_a_fault_reaches_those_whose_requests_were_on_their_way(core, engine, monkeypatch):
    entered, may_fail = threading.Event(), threading.Event()

    def failing(plan):
        entered.set()
        assert may_fail.wait(SECONDS)
        raise RuntimeError("boom")

    monkeypatch.setattr(core._runner, "launch", failing)
    monkeypatch.setattr(core, "abort", lambda *args: 1 / 0)
    first, listener = submit(engine)
    assert entered.wait(SECONDS)
    late = [submit(engine)[1] for _ in range(3)]
    engine.abort(first)
    may_fail.set()
    for waiting in (listener, *late):
        assert isinstance(waiting.all()[-1], Failure)


def test_a_sink_that_fails_loses_its_own_request_only(engine, caplog):
    told = []

    def failing(request: Request, event: TokenEvent | Failure) -> None:
        told.append(event)
        raise ValueError("my fault")

    _, listener = submit(engine, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    engine.submit(text(2, 10), ENDLESS, failing)
    assert len(listener.all()) == 20
    eventually(lambda: idle(engine))
    assert len(told) == 1
    assert "my fault" in caplog.text
    assert engine.stats().healthy


def test_a_sink_that_fails_at_the_end_too_keeps_the_news_from_nobody(core, engine, monkeypatch):
    may_fail = threading.Event()

    def failing(*args: object) -> None:
        assert may_fail.wait(SECONDS)
        raise ValueError("boom")

    monkeypatch.setattr(core._runner, "launch", failing)
    listeners = []
    for _ in range(4):
        engine.submit(text(2, 10), ENDLESS, failing)
        listeners.append(submit(engine)[1])
    may_fail.set()
    for listener in listeners:
        assert listener.all()[-1].message == "the engine failed: ValueError: boom"


def test_idle_it_sleeps(core, engine, monkeypatch):
    assert len(submit(engine, SHORT)[1].all()) == 5
    eventually(lambda: idle(engine))
    rounds = []
    stats = core.stats
    monkeypatch.setattr(core, "stats", lambda: rounds.append(1) or stats())
    time.sleep(0.1)
    assert not rounds
    assert len(submit(engine, SHORT)[1].all()) == 5
    assert rounds


def test_its_thread_computes_on_the_device_of_the_model(core, monkeypatch):
    """A thread has a current GPU of its own, which is the first unless it says otherwise."""
    told = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append((device, threading.current_thread().name)))
    monkeypatch.setattr(Core, "device", torch.device("cuda", 1))
    engine = Engine(core)
    engine.close()
    assert told == [(torch.device("cuda", 1), "kvant-engine")]
