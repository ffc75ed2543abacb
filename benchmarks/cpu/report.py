"""What a run measured, as JSON and as tables: every figure, medians, and ratios of kvant to llama.cpp."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from points import OURS, REFERENCE, Point


@dataclass(frozen=True)
class Ratio:
    """How many times as fast, over the repeats."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Figures:
    """One point's.

    Attributes:
        prompt_tokens: of each sequence.
        rates: tokens per second in each repeat, by variant; all of one length, a column is one moment of the machine.
    """

    point: Point
    prompt_tokens: int
    rates: Mapping[str, Sequence[float]]

    @property
    def medians(self) -> dict[str, float]:
        """Over the repeats, by variant."""
        return {name: median(rates) for name, rates in self.rates.items()}

    @property
    def reference(self) -> str | None:
        """llama.cpp with the type of KV cache whose median is the highest; None where it was not measured."""
        return max(_of(REFERENCE, self.rates), key=self.medians.__getitem__, default=None)

    @property
    def ratios(self) -> dict[str, Ratio]:
        """kvant's variants to `reference`, repeat by repeat."""
        if self.reference is None:
            return {}
        theirs = self.rates[self.reference]
        return {name: ratio(self.rates[name], theirs) for name in _of(OURS, self.rates)}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of two series, one pair a repeat."""
    quotients = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Ratio(median(quotients), min(quotients), max(quotients))


@dataclass
class Group:
    """One model on so many threads.

    Attributes:
        details: what each variant's process says of itself.
        failed: variants that were left out, and why; they have no figures.
        load_average: of the machine over a minute, before and after. More than the threads here was other work.
    """

    model: str
    threads: int
    figures: Sequence[Figures]
    details: Mapping[str, Mapping[str, Any]]
    failed: Mapping[str, str]
    load_average: tuple[float, float]


@dataclass
class Report:
    """A whole run; a group is added when it is done."""

    machine: Mapping[str, Any]
    commit: str | None
    settings: Mapping[str, Any]
    groups: list[Group] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Replace the file in one step: whoever reads it, or a crash, finds the old one or the new one."""
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        fresh.write_text(_compact(json.dumps(self._document(), indent=2)) + "\n", encoding="utf-8")
        fresh.replace(path)

    def markdown(self) -> str:
        """For each group a table of medians and one of ratios."""
        heading = f"{self.machine['cpu']}; medians of {self.settings['repeats']} repeats"
        return "\n".join([heading, *map(_section, self.groups)])

    def _document(self) -> dict[str, Any]:
        head = {"machine": self.machine, "commit": self.commit, "settings": self.settings}
        return {**head, "groups": [_group_document(group) for group in self.groups]}


def _group_document(group: Group) -> dict[str, Any]:
    return {**asdict(group), "figures": [_figures_document(figures) for figures in group.figures]}


def _figures_document(figures: Figures) -> dict[str, Any]:
    return {
        "point": figures.point.name,
        "prompt_tokens": figures.prompt_tokens,
        "tokens_per_second": {name: [_short(rate) for rate in rates] for name, rates in figures.rates.items()},
        "medians": {name: _short(value) for name, value in figures.medians.items()},
        "reference": figures.reference,
        "ratios": {
            name: {key: _short(value) for key, value in asdict(one).items()} for name, one in figures.ratios.items()
        },
    }


def _section(group: Group) -> str:
    threads = "1 thread" if group.threads == 1 else f"{group.threads} threads"
    parts = [f"\n## {group.model}, {threads}\n", _medians_table(group)]
    if any(figures.ratios for figures in group.figures):
        parts.append(_ratios_table(group))
    parts += [f"Left out: {name}: {reason}" for name, reason in group.failed.items()]
    return "\n".join(parts)


def _medians_table(group: Group) -> str:
    names = _names(group)
    rows = [[f.point.label, *(_figure(f.medians.get(name)) for name in names)] for f in group.figures]
    return _table(["tokens/s", *names], rows)


def _ratios_table(group: Group) -> str:
    names = _of(OURS, _names(group))
    rows = [[f.point.label, f.reference or "", *(_spread(f.ratios.get(name)) for name in names)] for f in group.figures]
    return _table([f"{OURS} / {REFERENCE}", f"fastest {REFERENCE}", *names], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, rule, *rows])


def _names(group: Group) -> list[str]:
    return list(dict.fromkeys(name for figures in group.figures for name in figures.rates))


def _of(peer: str, names: Mapping[str, Any] | Sequence[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{peer}:")]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _spread(value: Ratio | None) -> str:
    return "" if value is None else f"{value.median:.2f} ({value.min:.2f} to {value.max:.2f})"


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _compact(text: str) -> str:
    """Indented JSON with each innermost list on one line. (In JSON a line never ends inside a text.)"""
    return re.sub(r"\[\n[^][{}]*\]", lambda match: f"[{' '.join(match[0][1:-1].split())}]", text)
