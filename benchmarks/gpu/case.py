"""One thing to measure, and the order in which things are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu.machine import Machine

STAGES = ("correctness", "ceilings", "attention", "linear", "small", "tuning", "engine")  # the most valuable first
FIRST = ("correctness", "ceilings")  # without these other figures say little


@dataclass(frozen=True)
class Case:
    """A measurement of its own: it is done or not, and no other depends on it.

    Attributes:
        stage: one of `STAGES`.
        tags: what it is; the report finds it by them.
        run: measures it, and gives figures that JSON can hold.
        seconds: about as long as it may take on a card, compiling included.
        lasting: whether it is worth keeping. If not, it prepares the others of its stage in each run.
        target: whether a target needs it.
    """

    stage: str
    tags: Mapping[str, Any]
    run: Callable[[Machine], Mapping[str, Any]] = field(compare=False)
    seconds: float = 10.0
    lasting: bool = True
    target: bool = False

    @property
    def rank(self) -> tuple[bool, int]:
        """The order: what everything rests on, what the targets ask for, then the rest, each stage by stage."""
        return not (self.target or self.stage in FIRST), STAGES.index(self.stage)

    @property
    def name(self) -> str:
        """The stage and all tags; no two cases have the same."""
        return "/".join([self.stage, *map(str, self.tags.values())])
