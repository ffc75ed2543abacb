"""The results of one card, found by what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gpu.results import Record, latest

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class View:
    """The latest records of one card, in one size."""

    card: str
    small: bool
    records: Sequence[Record]

    @classmethod
    def each(cls, records: Sequence[Record]) -> list[View]:
        """One for each card and size there is."""
        kinds = dict.fromkeys((record["card"], record["small"]) for record in records)
        newest = latest(records)
        return [cls(c, s, [r for r in newest if (r["card"], r["small"]) == (c, s)]) for c, s in kinds]

    def all(self, stage: str, **tags: Any) -> list[Record]:
        """The records of a stage that have these tags, among others."""
        wanted = tags.items()
        return [r for r in self.records if r["stage"] == stage and wanted <= r["tags"].items()]

    def figure(self, name: str, stage: str, **tags: Any) -> Any:
        """One figure of the record with these tags; None where it was not measured."""
        found = (record["figures"].get(name) for record in self.all(stage, **tags) if "figures" in record)
        return next(found, None)

    def values(self, stage: str, tag: str, **tags: Any) -> list[Any]:
        """The values that a tag has, in the order in which they were measured."""
        return list(dict.fromkeys(r["tags"][tag] for r in self.all(stage, **tags) if tag in r["tags"]))

    def ceiling(self, what: str) -> float | None:
        """Bytes or operations a second: "copy", "bf16", "int8"."""
        return self.figure("per_second", "ceilings", what=what)

    def us(self, stage: str, **tags: Any) -> float | None:
        """Microseconds of a call."""
        return self.figure("us", stage, **tags)

    def floor_us(self, stage: str, **tags: Any) -> float | None:
        """The least that a call could take: its bytes at the bandwidth, or its operations at their rate."""
        size, flops, rate = (self.figure(name, stage, **tags) for name in ("bytes", "flops", "rate"))
        copy = self.ceiling("copy")
        product = self.ceiling(rate) if flops else 1.0
        if size is None or copy is None or product is None:
            return None
        return max(size / copy, (flops or 0) / product) * 1e6

    def fraction(self, stage: str, **tags: Any) -> float | None:
        """How much of what is possible: the floor over the time."""
        return ratio(self.floor_us(stage, **tags), self.us(stage, **tags))


def ratio(first: float | None, second: float | None) -> float | None:
    """first / second; None where one is not known."""
    return None if first is None or not second else first / second
