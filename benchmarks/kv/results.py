"""The results of a task in several KV formats: the JSON file, the comparisons that follow from it, the table."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from paired import Comparison, compare, wilson
from problems import PASSED

from kvant.errors import ConfigError

BASELINE = "auto"


@dataclass(frozen=True)
class FormatRun:
    """What one format's cache brought.

    Attributes:
        stored_as: the name under which the engine keeps "auto".
        bytes_per_token: of the KV cache, in all layers.
        outcomes: a verdict per problem, `PASSED` or what was wrong.
        digests: of each answer's token ids; equal ones mean equal answers.
        generated_tokens: in all answers.
        cut_off: answers that reached the limit of tokens.
        seconds: generation alone; neither loading nor judging.
        versions: of what computed it.
    """

    stored_as: str
    bytes_per_token: int
    outcomes: tuple[str, ...]
    digests: tuple[str, ...]
    generated_tokens: int
    cut_off: int
    seconds: float
    versions: Mapping[str, str | None]

    @property
    def correct(self) -> tuple[int, ...]:
        """1 for each problem that passed, else 0."""
        return tuple(int(outcome == PASSED) for outcome in self.outcomes)

    @property
    def score(self) -> float:
        """The share of problems that passed."""
        return sum(self.correct) / len(self.correct)

    def identical(self, other: FormatRun) -> float:
        """The share of answers that are the other's, token for token."""
        same = [a == b for a, b in zip(self.digests, other.digests, strict=True)]
        return sum(same) / len(same)


@dataclass
class Results:
    """Everything known about one model and task under one setting; a format's run is added when it is done.

    Attributes:
        header: model, task, settings and names of the problems. Runs under different headers cannot be compared.
        runs: by the format's name.
    """

    header: dict[str, Any]
    runs: dict[str, FormatRun] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """What `write` wrote.

        Raises:
            ConfigError: the file is something else.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            formats = document.pop("formats")
            return cls(document, {name: _run_from_json(entry) for name, entry in formats.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} holds no results of this script ({error}); name another --out") from error

    def write(self, path: Path) -> None:
        """Replace the file in one step: whoever reads it, or a crash, finds the old one or the new one."""
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_text(_compact(json.dumps(self._document(), indent=2)) + "\n", encoding="utf-8")
        fresh.replace(path)

    def against_baseline(self, name: str) -> Comparison | None:
        """The format beside the 16-bit cache, where that is known and is not the format itself."""
        baseline = self.runs.get(BASELINE)
        if baseline is None or name == BASELINE:
            return None
        return compare(baseline.correct, self.runs[name].correct)

    def markdown(self) -> str:
        """A table with a row per format, and above it what was measured."""
        settings = ", ".join(f"{key} {value}" for key, value in self.header["settings"].items() if _is_short(value))
        rows = [
            _row(name, run, self.against_baseline(name), self.runs.get(BASELINE)) for name, run in self.runs.items()
        ]
        heading = f"{self.header['model']}, {self.header['task']}, {len(self.header['problems'])} problems; {settings}"
        return "\n".join([heading, "", *_HEAD, *rows]) + "\n"

    def _document(self) -> dict[str, Any]:
        return {**self.header, "formats": {name: self._entry(name, run) for name, run in self.runs.items()}}

    def _entry(self, name: str, run: FormatRun) -> dict[str, Any]:
        derived = {"score": run.score, "n": len(run.correct), "interval": wilson(sum(run.correct), len(run.correct))}
        entry = {**derived, "correct": run.correct, **asdict(run), "versus_auto": None}
        comparison = self.against_baseline(name)
        if comparison is not None:
            entry["versus_auto"] = {**asdict(comparison), "identical": run.identical(self.runs[BASELINE])}
        return entry


def _run_from_json(entry: Mapping[str, Any]) -> FormatRun:
    values = {name: entry[name] for name in FormatRun.__dataclass_fields__}
    return FormatRun(**{**values, "outcomes": tuple(values["outcomes"]), "digests": tuple(values["digests"])})


def _compact(text: str) -> str:
    """Indented JSON with each innermost list on one line. (In JSON a line never ends inside a text.)"""
    return re.sub(r"\[\n[^][{}]*\]", lambda match: f"[{' '.join(match[0][1:-1].split())}]", text)


_HEAD = (
    "| KV cache | bytes/token | score | 95% | vs auto | 95%, paired | won/lost | McNemar p | same answers | tokens/s |",
    "| --- | ---: | ---: | --- | ---: | --- | --- | ---: | ---: | ---: |",
)


def _row(name: str, run: FormatRun, comparison: Comparison | None, baseline: FormatRun | None) -> str:
    low, high = wilson(sum(run.correct), len(run.correct))
    cells = [
        f"`{name}`" if name == run.stored_as else f"`{name}` ({run.stored_as})",
        f"{run.bytes_per_token:,}",
        f"{run.score:.1%}",
        f"{low:.1%} to {high:.1%}",
        *(_comparison_cells(comparison) if comparison else ["", "", "", ""]),
        f"{run.identical(baseline):.0%}" if comparison and baseline else "",
        f"{run.generated_tokens / run.seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _comparison_cells(comparison: Comparison) -> list[str]:
    low, high = comparison.interval
    return [
        f"{comparison.difference:+.1%}",
        f"{low:+.1%} to {high:+.1%}",
        f"{comparison.gained}/{comparison.lost}",
        f"{comparison.p_value:.3f}",
    ]


def _is_short(value: Any) -> bool:
    return isinstance(value, int | str) and len(str(value)) < 20
