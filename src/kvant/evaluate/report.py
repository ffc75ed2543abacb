"""A comparison as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from kvant.config import EngineConfig
from kvant.evaluate.perplexity import Comparison
from kvant.evaluate.rows import Row


def table(comparison: Comparison) -> Table:
    """The rows, each number with its standard error."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("KV cache")
    for heading in ("bits", "perplexity", "change", "KL (nats)", "top-1"):
        shown.add_column(heading, justify="right")
    for row in comparison.rows:
        shown.add_row(*_cells(row, is_baseline=row is comparison.rows[0]))
    return shown


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the table should know: what was measured, and which rows are broken."""
    row, weights = comparison.rows[0], comparison.engine.weights
    model = comparison.model if weights == "auto" else f"{comparison.model} with {weights} weights"
    lines = [
        f"{model} in {comparison.dtype}; {row.windows} x {row.window_size} tokens of {comparison.text}",
        "bits: stored for each key or value element at 4096 tokens, metadata included. change, KL and top-1: against "
        "the first row. ±: one standard error.",
    ]
    broken = [row.plan for row in comparison.rows if not _is_finite(row)]
    return [*lines, f"the model's outputs are not finite with: {', '.join(broken)}"] if broken else lines


def as_json(comparison: Comparison, versions: Mapping[str, str]) -> dict[str, Any]:
    """The comparison in JSON's types; a number that is not finite becomes null.

    "engine" holds those settings that are not the defaults; the rows name the `kv_cache_dtype` that each had.
    `versions` are those of the programs that made it.
    """
    defaults = EngineConfig()
    settings = {field.name: getattr(comparison.engine, field.name) for field in dataclasses.fields(EngineConfig)}
    return {
        "model": comparison.model,
        "text": comparison.text,
        "dtype": comparison.dtype,
        "engine": {name: _plain(value) for name, value in settings.items() if value != getattr(defaults, name)},
        "versions": dict(versions),
        "rows": [{name: _plain(value) for name, value in dataclasses.asdict(row).items()} for row in comparison.rows],
    }


def _cells(row: Row, is_baseline: bool) -> list[str]:
    cells = [
        f"{row.kv_cache_dtype} ({row.plan})" if is_baseline else row.plan,
        f"{row.bits_per_element:.2f}",
        f"{row.ppl:.2f} ± {row.ppl_stderr:.2f}",
    ]
    if is_baseline:
        return cells
    return [
        *cells,
        f"{row.ppl_change:+.2%} ± {row.ppl_change_stderr:.2%}",
        f"{row.kl:.1e} ± {row.kl_stderr:.0e}",
        f"{row.top1:.1%} ± {row.top1_stderr:.1%}",
    ]


def _is_finite(row: Row) -> bool:
    return math.isfinite(row.ppl) and math.isfinite(row.kl)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | None) else str(value)
