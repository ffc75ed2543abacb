"""Linear layers by the shapes of two small models and the rows that come at once; mostly of 4-bit weights."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import byref
from functools import partial
from itertools import count as numbers
from math import ceil

import torch
from kernel import Kernel, Planned
from torch import Tensor

from kvant.formats.weight import PackedWeight
from kvant.kernels.cpu import structs
from kvant.kernels.cpu.native import pointer
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.cpu.weights import NativeWeight, native_weight

SHAPES = ((3072, 576), (576, 1536), (9728, 896), (896, 4864))  # rows, columns: gate_up and down
ROWS = (1, 4, 8, 96, 256)
GROUP = 32
OTHERS = ("int8", "fp16", "fp32")
STREAMED = 160 << 20  # bytes of weights that are read one after the other, more than a processor's cache holds
MANY = 16  # rows from which the products take so long that one weight shows it
_ROW_BLOCK = 8
_BITS = {"int4": 4, "int8": 8, "fp16": 16, "fp32": 32}
_DENSE = {"fp16": torch.float16, "fp32": torch.float32}


def kernels(ops: CpuOps) -> Iterator[Planned]:
    """A weight that the processor's caches hold, and with few rows as many as come from memory."""
    shapes = [("int4", shape, tokens) for shape in SHAPES for tokens in ROWS]
    shapes += [(fmt, SHAPES[0], tokens) for fmt in OTHERS for tokens in (ROWS[0], ROWS[-1])]
    for fmt, shape, tokens in shapes:
        for name in ("cached", "streamed") if tokens < MANY else ("cached",):
            make = partial(_kernel, ops, fmt, shape, tokens, name == "streamed")
            yield f"linear {fmt} {shape[0]}x{shape[1]} rows {tokens} {name}", make


def _kernel(ops: CpuOps, fmt: str, shape: tuple[int, int], tokens: int, streamed: bool) -> Kernel:
    """A product with the next weight; its unit is one with one row."""
    size = _bytes(fmt, *shape)
    weights = [_weight(ops, fmt, *shape) for _ in range(ceil(STREAMED / size) if streamed else 1)]
    rows, columns = weights[0].shape
    layers = [structs.Linear(weight.struct, None) for weight in weights]
    x, out, turn = torch.randn(tokens, columns), torch.empty(tokens, rows), numbers()

    def run() -> None:
        assert weights  # their memory, which the structures point to
        layer = layers[next(turn) % len(layers)]
        ops.native.call("linear", byref(layer), pointer(x), tokens, pointer(out))

    products = "dot" if fmt.startswith("int") else "fma"
    return Kernel(run, tokens, size, 2 * rows * columns * tokens, products)


def _bytes(fmt: str, rows: int, columns: int) -> int:
    bits = _BITS[fmt]
    return rows * (columns * bits // 8 + (columns // GROUP * 2 if fmt.startswith("int") else 0))


def _weight(ops: CpuOps, fmt: str, rows: int, columns: int) -> NativeWeight:
    """Any codes, in the kernels' layout."""
    if not fmt.startswith("int"):
        return ops.prepare(PackedWeight.dense(torch.randn(rows, columns).to(_DENSE[fmt])))
    shape = rows // _ROW_BLOCK, columns // GROUP, _ROW_BLOCK
    memory: dict[str, Tensor] = {
        "codes": torch.randint(256, (rows * columns * _BITS[fmt] // 8,), dtype=torch.uint8),
        "scales": torch.rand(shape).mul(0.01).half(),
    }
    return native_weight(fmt, rows, columns, GROUP, memory)
