"""What was measured, a line each, written at once: nothing is lost when a run is stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Results:
    """The file of a directory. A record has name, stage, tags, card, small, run, seconds, and figures or an error."""

    directory: Path

    @property
    def path(self) -> Path:
        """Where the lines are."""
        return self.directory / "results.jsonl"

    def append(self, record: Record) -> None:
        """One more line, on the disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[Record]:
        """All lines in order; one that was cut off is left out."""
        if not self.path.is_file():
            return []
        return [found for line in self.path.read_text(encoding="utf-8").splitlines() if (found := _parsed(line))]

    def done(self, card: str, small: bool) -> set[str]:
        """The names that were measured on this card, in this size."""
        return {r["name"] for r in self.records() if (r["card"], r["small"]) == (card, small) and "figures" in r}

    def of_run(self, run: str) -> set[str]:
        """The names that this run has measured, or has failed to."""
        return {record["name"] for record in self.records() if record["run"] == run}


def latest(records: Iterable[Record]) -> list[Record]:
    """The last measurement of each name and card; an error stands only where there are no figures."""
    found: dict[tuple[str, str, bool], Record] = {}
    for record in records:
        key = (record["name"], record["card"], record["small"])
        if "figures" in record or "figures" not in found.get(key, {}):
            found[key] = record
    return list(found.values())


def _parsed(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "name" in record else None
