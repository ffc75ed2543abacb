"""What kvant means to reach on an H100 or H200, and whether it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpu.linear import CUBLAS, ROWS
from gpu.view import NOT_MEASURED, View, ratio

LAYERS = ("qkv", "out", "gate_up", "down")
_STEP = "decode 64x4096"
_NAMES = {"llama-2-7b": "Llama-2-7B", "llama-3-8b": "Llama-3-8B"}


@dataclass(frozen=True)
class Target:
    """One figure beside what it should be.

    Attributes:
        least: whether `wanted` is a lower bound; else it is an upper one.
        scale, unit: how figures are printed: times the one, followed by the other.
    """

    label: str
    figure: float | None
    wanted: float
    least: bool = True
    scale: float = 1.0
    unit: str = ""

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.figure is None:
            return NOT_MEASURED
        return "met" if (self.figure >= self.wanted) == self.least or self.figure == self.wanted else "missed"

    @property
    def shown(self) -> str:
        """The figure."""
        return NOT_MEASURED if self.figure is None else f"{self.figure * self.scale:.4g}{self.unit}"

    @property
    def bound(self) -> str:
        """What it should be."""
        return f"{'≥' if self.least else '≤'} {self.wanted * self.scale:.4g}{self.unit}"


def targets(view: View) -> list[Target]:
    """All of them. Miniatures measure none."""
    found = [*_attention(view), *_linear(view), *_engine(view)]
    return [replace(target, figure=None) for target in found] if view.small else found


def _attention(view: View) -> Iterator[Target]:
    for model, name in _NAMES.items():
        where = f"decode attention, 64 x 4096 tokens, {name}"
        found = view.fraction("attention", model=model, format="bf16", step=_STEP)
        yield Target(f"{where}: 16 bit, of the copy bandwidth", found, 0.8, scale=100, unit="%")
        plain = view.us("attention", model=model, format="bf16", step=_STEP)
        for fmt, wanted in (("int8", 1.8), ("int4", 3.0)):
            times = ratio(plain, view.us("attention", model=model, format=fmt, step=_STEP))
            yield Target(f"{where}: {fmt} beside our 16 bit", times, wanted, unit="x")


def _linear(view: View) -> Iterator[Target]:
    for rows, wanted in ((1, 0.8), (16, 0.65)):
        label = f"W4A16 linear, Llama-2-7B, batch {rows}: of the bandwidth"
        yield Target(label, layer_fraction(view, "llama-2-7b", "w4", rows), wanted, scale=100, unit="%")
    yield Target(
        "W4A16 linear beside cuBLAS bf16, the worst of all shapes and batches", worst_to_cublas(view), 1.0, unit="x"
    )


def layer_fraction(view: View, model: str, fmt: str, rows: int) -> float | None:
    """Of the four projections of a layer together: their floors over their times."""
    tags = [{"model": model, "layer": layer, "format": fmt, "rows": rows} for layer in LAYERS]
    floors, times = ([f("linear", **tag) for tag in tags] for f in (view.floor_us, view.us))
    if None in floors or None in times:
        return None
    return sum(floors) / sum(times)


def worst_to_cublas(view: View) -> float | None:
    """The least ratio of cuBLAS's time to that of int4. Where some are missing, only one below 1 says something."""
    found = {}
    for record in view.all("linear", format="w4"):
        tags = {**record["tags"], "format": CUBLAS}
        place = tuple(record["tags"][name] for name in ("model", "layer", "rows"))
        found[place] = ratio(view.us("linear", **tags), view.us("linear", **record["tags"]))
    worst = min((value for value in found.values() if value is not None), default=None)
    whole = all(found.get(("llama-2-7b", layer, rows)) for layer in LAYERS for rows in ROWS)
    return worst if whole or (worst is not None and worst < 1) else None


def _engine(view: View) -> Iterator[Target]:
    speed = view.figure("tokens_per_second", "engine", what="decode", model="llama-2-7b", weights="w4", kv="bf16")
    yield Target("Llama-2-7B W4A16, batch 1, prompt 1, 512 new", speed, 850, unit=" tok/s")
    for kv, wanted in (("int8", 1.5), ("int4", 2.0)):
        label = f"throughput in equal memory (4 GiB of KV), Llama-2-7B: {kv} beside our 16 bit"
        yield Target(label, throughput_ratio(view, "llama-2-7b", 4, kv), wanted, unit="x")
    for weights, kv, wanted in (("bf16", "int8", 46e9), ("w4", "int4", 24e9)):
        tags = {"model": "qwen-7b", "weights": weights, "kv": kv, "batch": 100, "new": 1024}
        peak = view.figure("peak_bytes", "engine", what="memory", **tags)
        label = f"memory, Qwen-7B, batch 100, 1024 tokens: {kv} KV, {weights} weights"
        yield Target(label, peak, wanted, least=False, scale=1e-9, unit=" GB")


def throughput_ratio(view: View, model: str, pool: int, kv: str) -> float | None:
    """Output tokens a second of one KV format over those of 16 bit."""
    first, second = (
        view.figure("output_tokens_per_second", "engine", what="throughput", model=model, pool_gib=pool, kv=one)
        for one in (kv, "bf16")
    )
    return ratio(first, second)
