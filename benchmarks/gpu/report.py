"""From results to a page, DIR/report.md with its pictures, and to one file of everything, DIR/report.json.

PYTHONPATH=src:benchmarks python -m gpu.report DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu import svg
from gpu.results import Results
from gpu.tables import SECTIONS
from gpu.targets import layer_fraction, targets
from gpu.view import View
from kvant.kernels.triton.tuning import card_name

LEGEND = (
    "A call's time is the median of launches of a CUDA graph, on inputs that no cache holds; * where the host launched "
    "each call. Beside it: how much of the floor that is (the bytes at the copy bandwidth or the operations at their "
    "rate, whichever takes longer), and times as fast as 16 bit (attention) or as cuBLAS in bfloat16 (linear layers)."
)


def main() -> None:
    """Write the report of a directory."""
    write_report(Path(sys.argv[1]))


def write_report(directory: Path) -> None:
    """Replace the report by one of all results there are."""
    views = View.each([record for record in Results(directory).records() if record["card"]])
    pages = [page(view, directory) for view in views] or ["nothing was measured\n"]
    (directory / "report.md").write_text("\n".join(pages), encoding="utf-8")
    document = [_document(view) for view in views]
    (directory / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def page(view: View, directory: Path) -> str:
    """Markdown of one card, its pictures written beside it."""
    facts = view.all("environment")[-1]["figures"] if view.all("environment") else {}
    shown = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "cuda", "commit") if facts.get(name))
    parts = [
        f"# {view.card}{' (miniature shapes: no measurement)' if view.small else ''}\n",
        f"{shown}\n",
        f"{LEGEND}\n",
    ]
    for heading, section in SECTIONS:
        parts.append(f"## {heading}\n\n{section(view)}")
    stem = card_name(view.card) + ("-small" if view.small else "")
    for name, picture in pictures(view):
        path = directory / f"{stem}-{name}.svg"
        path.write_text(picture, encoding="utf-8")
        parts.append(f"![{name}]({path.name})\n")
    return "\n".join(parts)


def pictures(view: View) -> Iterator[tuple[str, str]]:
    """Those that there are figures for."""
    rows = []
    for record in view.all("attention", step="decode 64x4096"):
        fraction = view.fraction("attention", **record["tags"])
        if fraction is not None:
            rows.append((f"{record['tags']['model']} {record['tags']['format']}", 100 * fraction))
    if rows:
        yield "attention", svg.bars("Decode attention, 64 x 4096 tokens: of the copy bandwidth", rows, "%", 80)
    series = _linear_lines(view)
    if series:
        yield "linear", svg.lines("A layer's projections: of the floor", series, "rows", "%")
    series = _memory_lines(view)
    if series:
        yield "memory", svg.lines("Qwen-7B, 1024 tokens each", series, "batch", "GB")


def _linear_lines(view: View) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for model in view.values("linear", "model"):
        for fmt in view.values("linear", "format", model=model):
            for rows in view.values("linear", "rows", model=model, format=fmt):
                fraction = layer_fraction(view, model, fmt, rows)
                if fraction is not None:
                    series.setdefault(f"{model} {fmt}", []).append((rows, 100 * fraction))
    return series


def _memory_lines(view: View) -> dict[str, list[tuple[float, float]]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for record in view.all("engine", what="memory", new=1024):
        peak, tags = record.get("figures", {}).get("peak_bytes"), record["tags"]
        if peak:
            series.setdefault(f"{tags['weights']} weights, {tags['kv']} KV", []).append((tags["batch"], peak / 1e9))
    return series


def _document(view: View) -> dict[str, Any]:
    found = [{"target": t.label, "wanted": t.bound, "figure": t.figure, "verdict": t.verdict} for t in targets(view)]
    return {"card": view.card, "small": view.small, "targets": found, "records": list(view.records)}


if __name__ == "__main__":
    main()
