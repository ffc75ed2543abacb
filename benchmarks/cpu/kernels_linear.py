"""Linear layers of 4-bit weights in groups of 32, by the shapes of two small models and the rows that come at once."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import byref
from itertools import count as numbers
from math import ceil

import torch
from kernel import Kernel
from torch import Tensor

from kvant.kernels.cpu import structs
from kvant.kernels.cpu.native import pointer
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.cpu.weights import NativeWeight, native_weight

SHAPES = ((3072, 576), (576, 1536), (9728, 896), (896, 4864))  # rows, columns: gate_up and down
ROWS = (1, 4, 8, 96, 256)
GROUP = 32
STREAMED = 160 << 20  # bytes of weights that are read one after the other, more than a processor's cache holds
MANY = 16  # rows from which the products take so long that one weight shows it
_ROW_BLOCK = 8


def kernels(ops: CpuOps) -> Iterator[Kernel]:
    """A weight that the processor's caches hold, and with few rows as many as come from memory."""
    for rows, columns in SHAPES:
        for tokens in ROWS:
            yield _kernel(ops, [_weight(rows, columns)], tokens, "cached")
            if tokens < MANY:
                found = ceil(STREAMED / _bytes(rows, columns))
                yield _kernel(ops, [_weight(rows, columns) for _ in range(found)], tokens, "streamed")


def _kernel(ops: CpuOps, weights: list[NativeWeight], tokens: int, name: str) -> Kernel:
    """A product with the next weight; its unit is one with one row."""
    rows, columns = weights[0].shape
    layers = [structs.Linear(weight.struct, None) for weight in weights]
    x, out, turn = torch.randn(tokens, columns), torch.empty(tokens, rows), numbers()

    def run() -> None:
        assert weights  # their memory, which the structures point to
        layer = layers[next(turn) % len(layers)]
        ops.native.call("linear", byref(layer), pointer(x), tokens, pointer(out))

    operations = 2 * rows * columns * tokens
    return Kernel(
        f"linear {rows}x{columns} rows {tokens} {name}", run, tokens, _bytes(rows, columns), operations, "dot"
    )


def _bytes(rows: int, columns: int) -> int:
    return rows * (columns // 2 + columns // GROUP * 2)


def _weight(rows: int, columns: int) -> NativeWeight:
    """Any codes, in the kernels' layout."""
    shape = rows // _ROW_BLOCK, columns // GROUP, _ROW_BLOCK
    memory: dict[str, Tensor] = {
        "codes": torch.randint(256, (rows * columns // 2,), dtype=torch.uint8),
        "scales": torch.rand(shape).mul(0.01).half(),
    }
    return native_weight("int4", rows, columns, GROUP, memory)
