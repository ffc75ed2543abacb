"""How long a call takes: the median of many, on inputs that no cache holds from the time before."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch

from gpu.machine import Machine

T = TypeVar("T")
Call = Callable[[], Any]
_MOST_COPIES = 64
_SECONDS = 0.15  # of one series on a card


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        spread: how far the medians of two series lie apart, relative to the smaller one.
        graph: whether a CUDA graph launched the calls. If not, a short call is as long as the host takes to launch it.
    """

    us: float
    spread: float
    graph: bool


def rotated(machine: Machine, thing: T, size: int) -> list[T]:
    """The thing and copies of it, together three times as large as the card's last cache."""
    wanted = -(-3 * machine.l2_bytes // max(size, 1)) if machine.rotates else 1
    return [thing, *(copy.deepcopy(thing) for _ in range(min(max(wanted, 1), _MOST_COPIES) - 1))]


def measure(machine: Machine, calls: Sequence[Call], seconds: float = _SECONDS) -> Timing:
    """The time of one of several like calls, which differ in their inputs only."""
    return _on_card(calls, seconds) if machine.cuda else _on_cpu(calls)


def _on_cpu(calls: Sequence[Call]) -> Timing:
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return Timing(median(times) * 1e6, 0.0, False)


def _on_card(calls: Sequence[Call], seconds: float) -> Timing:
    for call in calls[:2]:  # compiles, and fills what is made at first use
        call()
    torch.cuda.synchronize()
    for call in calls[2:]:
        call()
    launch, graph = _launcher(calls)
    first, second = (_series(launch, seconds) / len(calls) for _ in range(2))
    return Timing(min(first, second), abs(first - second) / min(first, second), graph)


def _launcher(calls: Sequence[Call]) -> tuple[Call, bool]:
    """All calls one after the other, as one launch where they can be captured."""

    def eager() -> None:
        for call in calls:
            call()

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            eager()
    except Exception:  # what cannot be captured waits for the card
        torch.cuda.set_stream(torch.cuda.default_stream())  # a failed capture does not always leave its own
        torch.cuda.synchronize()
        return eager, False
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay, True


def _series(launch: Call, seconds: float) -> float:
    """The median of launches, microseconds."""
    once = _events(launch, 1)[0]
    return median(_events(launch, min(max(int(seconds * 1e6 / once), 5), 200)))


def _events(launch: Call, count: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        launch()
        mark.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) * 1e3 for first, second in itertools.pairwise(marks)]
