"""The tables of the report, each from one stage's results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu.linear import CUBLAS
from gpu.targets import targets, throughput_ratio
from gpu.view import NOT_MEASURED, View, ratio

# Qwen-7B's own code on an A100, bfloat16 weights, GB of memory without and with its int8 KV cache (its README, 2023).
QWEN_BY_BATCH: Mapping[int, str] = {
    1: "16.3 / 15.5", 4: "24.1 / 17.2", 16: "31.7 / 22.3", 32: "48.7 / 30.2", 64: "OOM / 48.2", 100: "OOM / 72.4",
}  # fmt: skip
QWEN_BY_LENGTH: Mapping[int, str] = {
    512: "15.2 / 15", 1024: "16.3 / 15.5", 2048: "17.6 / 15.8", 4096: "19.5 / 16.6", 8192: "23.2 / 17.6",
}  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    if not rows:
        return f"{NOT_MEASURED}\n"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: float | None, form: str = ".4g", unit: str = "", scale: float = 1.0) -> str:
    """A figure, or that there is none."""
    return NOT_MEASURED if value is None else f"{value * scale:{form}}{unit}"


def target_table(view: View) -> str:
    """Each target, and whether it is met."""
    found = targets(view)
    return table(["target", "wanted", "figure", ""], [[t.label, t.bound, t.shown, t.verdict] for t in found])


def ceiling_table(view: View) -> str:
    """What the card can do."""
    rows = [
        ("copy, read and written", "copy", " TB/s"),
        ("bf16 products", "bf16", " TFLOP/s"),
        ("int8 products", "int8", " TOP/s"),
    ]
    return table(
        ["", "measured"], [[label, number(view.ceiling(what), unit=unit, scale=1e-12)] for label, what, unit in rows]
    )


def correctness_table(view: View) -> str:
    """By op: how many checks, which are wrong, the largest errors."""
    rows = []
    for op in view.values("correctness", "op"):
        found = [record["figures"] for record in view.all("correctness", op=op) if "figures" in record]
        wrong = [r for r in view.all("correctness", op=op) if "figures" in r and not r["figures"]["right"]]
        names = "; ".join(f"**{_label(r['tags'])}** ({', '.join(r['figures'].get('wrong', []))})" for r in wrong)
        worst = max((one["error"] for one in found), default=None)
        moving = sum(not one["repeatable"] for one in found)
        rows.append([op, str(len(found)), names or "none", number(worst, ".2g"), str(moving)])
    return table(["op", "checked", "wrong", "largest error on the whole", "not the same bits when repeated"], rows)


def attention_table(view: View) -> str:
    """A row a model and step, a column a format."""
    formats = view.values("attention", "format")
    rows = []
    for model in view.values("attention", "model"):
        for step in view.values("attention", "step", model=model):
            tags = {"model": model, "step": step}
            plain = view.us("attention", format="bf16", **tags)
            rows.append([model, step, *(_timed(view, "attention", plain, format=f, **tags) for f in formats)])
    return table(["model", "step", *formats], rows)


def _timed(view: View, stage: str, plain: float | None, **tags: Any) -> str:
    """Microseconds, how much of the floor, times as fast as the plain one; a star where the host launched each call."""
    us = view.us(stage, **tags)
    if us is None:
        return NOT_MEASURED
    star = "" if view.figure("graph", stage, **tags) else "*"
    return f"{us:.4g}{star} µs, {number(view.fraction(stage, **tags), '.0%')}, {number(ratio(plain, us), '.2f', 'x')}"


def linear_table(view: View) -> str:
    """A row a model, projection and format; a column a number of rows."""
    counts = sorted(view.values("linear", "rows"))
    rows = []
    for model in view.values("linear", "model"):
        for layer in view.values("linear", "layer", model=model):
            for fmt in view.values("linear", "format", model=model, layer=layer):
                tags = {"model": model, "layer": layer}
                cells = []
                for count in counts:
                    plain = view.us("linear", format=CUBLAS, rows=count, **tags)
                    cells.append(_timed(view, "linear", plain, format=fmt, rows=count, **tags))
                rows.append([model, layer, fmt, *cells])
    return table(["model", "projection", "format", *map(str, counts)], rows)


def small_table(view: View) -> str:
    """The other ops."""
    rows = []
    for record in view.all("small"):
        if "figures" in record:
            tags = record["tags"]
            us, fraction = view.us("small", **tags), view.fraction("small", **tags)
            star = "" if record["figures"]["graph"] else "*"
            rows.append([_label(tags), f"{number(us)}{star} µs", number(fraction, ".0%")])
    return table(["op, and tokens", "time", "of the floor"], rows)


def tuning_table(view: View) -> str:
    """What was chosen."""
    rows = []
    for record in view.all("tuning"):
        for one in record.get("figures", {}).get("kernels", ()):
            config = one["config"]
            sizes = " ".join(f"{name}={size}" for name, size in config["blocks"].items())
            chosen = f"{sizes} warps={config['num_warps']} stages={config['num_stages']}"
            gain = ratio(one["default_us"], one["us"])
            tried = f"{one['tried']} ({one['failed']} failed)"
            rows.append([one["op"], one["key"], chosen, number(one["us"]), number(gain, ".2f", "x"), tried])
    return table(["op", "key", "chosen", "µs", "beside the default", "tried"], rows)


def decode_table(view: View) -> str:
    """One sequence."""
    rows = []
    for record in view.all("engine", what="decode"):
        figures = record.get("figures")
        if figures:
            speed, copy = figures["tokens_per_second"], view.ceiling("copy")
            floor = ratio(copy, figures.get("read_bytes"))
            rows.append([*_setup(record["tags"]), number(speed), number(floor), number(ratio(speed, floor), ".0%")])
    return table(["model", "weights", "KV", "tok/s", "floor", "of it"], rows)


def prompt_table(view: View) -> str:
    """A row a format, a column a length; behind the stroke as it is where nothing is recorded."""
    records = [record for record in view.all("engine", what="prompt") if "figures" in record]
    lengths = list(dict.fromkeys(length for record in records for length in record["figures"]["ms"]))
    rows = []
    for record in records:
        recorded, launched = (record["figures"][name] for name in ("ms", "launched_ms"))
        cells = [f"{number(recorded.get(length))} / {number(launched.get(length))}" for length in lengths]
        rows.append([*_setup(record["tags"]), *cells])
    return table(["model", "weights", "KV", *lengths], rows)


def throughput_table(view: View) -> str:
    """All formats in equal memory."""
    rows = []
    for record in view.all("engine", what="throughput"):
        figures, tags = record.get("figures"), record["tags"]
        if figures:
            times = throughput_ratio(view, tags["model"], tags["pool_gib"], tags["kv"])
            cells = (figures["output_tokens_per_second"], figures["requests_per_second"])
            counts = [str(figures[name]) for name in ("requests", "pool_tokens", "preemptions")]
            rows.append([*_setup(tags), str(tags["pool_gib"]), *map(number, cells), number(times, ".2f", "x"), *counts])
    head = ["model", "weights", "KV", "GiB of KV", "output tok/s", "requests/s", "beside 16 bit", "requests"]
    return table([*head, "tokens it holds", "preemptions"], rows)


def memory_table(view: View, by: str) -> str:
    """GB of the card, by "batch" (1024 tokens each) or by "new" (one sequence), beside Qwen's own code."""
    fixed = {"new": 1024} if by == "batch" else {"batch": 1}
    published = QWEN_BY_BATCH if by == "batch" else QWEN_BY_LENGTH
    records = [r for r in view.all("engine", what="memory", **fixed) if "figures" in r]
    columns = list(dict.fromkeys((r["tags"]["weights"], r["tags"]["kv"]) for r in records))
    rows = []
    for count in sorted({r["tags"][by] for r in records}):
        tags = {"what": "memory", by: count, **fixed}
        cells = [
            number(view.figure("peak_bytes", "engine", weights=w, kv=k, **tags), ".1f", scale=1e-9) for w, k in columns
        ]
        rows.append([str(count), *cells, published.get(count, "")])
    return table([by, *(f"{w} weights, {k} KV" for w, k in columns), "Qwen's own code, 16 bit / int8 KV"], rows)


def error_table(view: View) -> str:
    """What failed."""
    rows = [[r["name"], r["error"].splitlines()[0][:300].replace("|", "/")] for r in view.records if "error" in r]
    return table(["what", "why"], rows) if rows else "none\n"


def _setup(tags: Mapping[str, Any]) -> list[str]:
    return [tags["model"], tags["weights"], tags["kv"]]


def _label(tags: Mapping[str, Any]) -> str:
    return " ".join(map(str, tags.values()))


SECTIONS: Sequence[tuple[str, Callable[[View], str]]] = (
    ("Targets", target_table),
    ("Ceilings", ceiling_table),
    ("Correctness", correctness_table),
    ("Attention, one layer", attention_table),
    ("Linear layers", linear_table),
    ("Other ops", small_table),
    ("Decoding one sequence: prompt 1, 512 new", decode_table),
    ("From a request to its first token, ms by the prompt's length: steps recorded / all launched", prompt_table),
    ("Throughput: lengths like those of chats, all requests there at the start", throughput_table),
    ("Memory of Qwen-7B by batch, 1024 tokens each, GB", lambda view: memory_table(view, "batch")),
    ("Memory of Qwen-7B by length, one sequence, GB", lambda view: memory_table(view, "new")),
    ("Configurations that were chosen", tuning_table),
    ("Failed", error_table),
)
