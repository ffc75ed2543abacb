"""Two kinds of picture as SVG: bars, and lines over a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#1f6feb", "#8250df", "#bf3989", "#1a7f37", "#9a6700", "#57606a")
_WIDTH, _LEFT, _RIGHT, _TOP = 760, 250, 90, 40
_BAR = 20
_PLOT = 300


def bars(title: str, rows: Sequence[tuple[str, float]], unit: str, mark: float | None = None) -> str:
    """A bar a row, and a line across where all of them should be."""
    most = max([*(value for _, value in rows), mark or 0, 1e-9]) * 1.05
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    height = _TOP + _BAR * len(rows) + 20
    parts = []
    for row, (label, value) in enumerate(rows):
        y = _TOP + _BAR * row
        parts.append(_text(_LEFT - 8, y + 14, label, "end"))
        parts.append(
            f'<rect x="{_LEFT}" y="{y + 3}" width="{value * scale:.1f}" height="{_BAR - 6}" fill="{COLOURS[0]}"/>'
        )
        parts.append(_text(_LEFT + value * scale + 6, y + 14, f"{value:.4g}{unit}"))
    if mark is not None:
        parts.append(_line(_LEFT + mark * scale, _TOP, _LEFT + mark * scale, height - 20, "#cf222e"))
    return _picture(title, height, parts)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]], across: str, upwards: str) -> str:
    """A line for each series of (x, y), x on a logarithmic axis, y from 0."""
    points = [point for line in series.values() for point in line]
    low, high = min(math.log2(x) for x, _ in points), max(math.log2(x) for x, _ in points)
    most = max(y for _, y in points) * 1.05 or 1.0
    left, width = 70, _WIDTH - 70 - 190

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log2(x) - low) / ((high - low) or 1)
        return left + width * share, _TOP + _PLOT * (1 - y / most)

    parts = [
        _line(left, _TOP + _PLOT, left + width, _TOP + _PLOT, "#8b949e"),
        _line(left, _TOP, left, _TOP + _PLOT, "#8b949e"),
    ]
    ticks = sorted({x for x, _ in points})
    parts += [_text(place(x, 0)[0], _TOP + _PLOT + 16, f"{x:g}", "middle") for x in ticks]
    for step in range(6):
        y = most * step / 5
        parts.append(_text(left - 6, place(1, y)[1] + 4, f"{y:.3g}", "end"))
    for index, (name, line) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in sorted(line)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(left + width + 12, _TOP + 16 * index + 12, name, colour=colour))
    parts.append(_text(left + width / 2, _TOP + _PLOT + 34, across, "middle"))
    parts.append(_text(left, _TOP - 8, upwards))
    return _picture(title, _TOP + _PLOT + 44, parts)


def _picture(title: str, height: float, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {_WIDTH} {height:g}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    background = f'<rect width="{_WIDTH}" height="{height:g}" fill="#ffffff"/>'
    return "\n".join([head, background, _text(12, 18, title, weight="bold"), *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal", colour: str = "#1f2328") -> str:
    style = f'text-anchor="{anchor}" font-weight="{weight}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
