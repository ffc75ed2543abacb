"""Products with weights at the shapes of models, by format and rows, beside cuBLAS in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch.nn.functional as F

from gpu.case import Case
from gpu.machine import Machine
from gpu.shapes import LinearShape, linear_shapes, spec_of
from gpu.timing import rotated
from gpu.weights import WEIGHT_FORMATS, packed
from gpu.workload import Workload, timed

CUBLAS = "cublas"  # PyTorch's own product, in bfloat16
ROWS = (1, 16, 4, 64, 256, 2, 8, 32, 128, 512, 2048)
MODELS = ("llama-2-7b", "llama-3-8b", "llama-2-13b")


def cases(small: bool) -> list[Case]:
    """The targets' rows first."""
    return [
        Case(
            "linear",
            {"model": model, "layer": shape.name, "format": fmt, "rows": rows},
            partial(timed, partial(build, shape, fmt, rows)),
            6,
            target=model == MODELS[0] and shape.name != "head" and rows in ROWS[:2] and fmt in (CUBLAS, "w4"),
        )
        for model, shape, fmt, rows in points(small)
    ]


def points(small: bool) -> Iterator[tuple[str, LinearShape, str, int]]:
    """(model, projection, format, rows) in the order of their worth."""
    if small:
        shape = linear_shapes(spec_of("llama-2-7b", small))[0]
        yield from (("llama-2-7b", shape, fmt, rows) for fmt in (CUBLAS, "w4", "w8", "w8a8") for rows in (1, 16))
        return
    shapes = {model: linear_shapes(spec_of(model, small)) for model in MODELS}
    body = [(model, shape) for model in MODELS[:1] for shape in shapes[model][:4]]
    yield from ((m, s, fmt, rows) for rows in ROWS for m, s in body for fmt in (CUBLAS, "w4"))
    others = [(model, shape) for model in MODELS[1:2] for shape in shapes[model][:4]]
    yield from ((m, s, fmt, rows) for rows in ROWS[:5] for m, s in others for fmt in (CUBLAS, "w4"))
    yield from ((m, s, fmt, rows) for rows in ROWS[:5] for m, s in body for fmt in ("w8", "w8a8"))
    heads = [(model, shapes[model][4]) for model in MODELS[:2]]
    yield from ((m, s, fmt, rows) for m, s in heads for fmt in ("bf16", "w8", CUBLAS) for rows in (1, 64))
    large = [(MODELS[2], shape) for shape in shapes[MODELS[2]][:4]]
    yield from ((m, s, fmt, rows) for rows in ROWS[:2] for m, s in large for fmt in (CUBLAS, "w4"))


def build(shape: LinearShape, fmt: str, rows: int, machine: Machine) -> Workload:
    """x [rows, k] with matrices [n, k], as many as no cache holds."""
    x = machine.random(rows, shape.k)
    kind = WEIGHT_FORMATS["bf16" if fmt == CUBLAS else fmt]
    weight = packed(machine, kind, shape.n, shape.k)
    size = weight.nbytes
    if fmt == CUBLAS:
        matrices = rotated(machine, weight.planes["weight"].data, size)
        calls = [partial(F.linear, x, matrix) for matrix in matrices]
    else:
        calls = [partial(machine.ops.linear, x, w) for w in rotated(machine, machine.ops.prepare(weight), size)]
    moved = size + x.nbytes + rows * shape.n * x.itemsize
    return Workload(calls, moved, 2 * rows * shape.n * shape.k, kind.rate)
