"""Calls to be timed, and the least that a card has to do for one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gpu.machine import Machine
from gpu.timing import Call, measure


@dataclass(frozen=True)
class Workload:
    """Like calls on inputs of their own, and what one of them cannot do without.

    Attributes:
        bytes: read or written at least once.
        flops: multiplications and additions.
        rate: the ceiling of these, "bf16" or "int8".
    """

    calls: Sequence[Call]
    bytes: int
    flops: int = 0
    rate: str = "bf16"


Build = Callable[[Machine], Workload]


def timed(build: Build, machine: Machine) -> Mapping[str, Any]:
    """The time of a workload's call, beside what it does."""
    work = build(machine)
    timing = measure(machine, work.calls)
    return {**asdict(timing), "bytes": work.bytes, "flops": work.flops, "rate": work.rate}
