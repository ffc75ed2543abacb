"""Decode steps one after the other, without the host between."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ctypes import addressof, c_int32
from dataclasses import dataclass


class Interrupt:
    """Has a burst end with the step that it is at. Any thread may set it."""

    def __init__(self) -> None:
        self._flag = c_int32()

    @property
    def address(self) -> int:
        """Of a 32-bit integer, not 0 where it is set."""
        return addressof(self._flag)

    def set(self) -> None:
        """Somebody wants the host."""
        self._flag.value = 1

    def clear(self) -> None:
        """The host has seen it."""
        self._flag.value = 0


@dataclass(frozen=True)
class Burst:
    """When to go back to the host; after one step at the earliest.

    Attributes:
        steps: after so many.
        stops: as soon as a row draws one of its tokens here, [R].
        seconds: where another step would end later than so long after the start.
        interrupt: once it is set.
    """

    steps: int
    stops: Sequence[Collection[int]]
    seconds: float
    interrupt: Interrupt
