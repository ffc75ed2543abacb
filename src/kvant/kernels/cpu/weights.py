"""Matrices in the kernels' layout (csrc/types.h)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvant.formats.memory import lazy_zeros
from kvant.formats.weight import PackedWeight
from kvant.kernels.cpu import structs
from kvant.kernels.cpu.native import Native, pointer

_ROW_BLOCK = 8
_GROUP = 32
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class NativeWeight:
    """A matrix for the kernels, the memory that `struct` points to, and what its values are given in."""

    struct: structs.Weight
    memory: tuple[Tensor, ...]
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int]:
        """[out_features, in_features]."""
        return self.struct.rows, self.struct.columns


def pack(native: Native, weight: PackedWeight) -> NativeWeight:
    """A weight in the kernels' layout; groups that they have no loop for become plain float32."""
    if weight.format == "dense":
        return _dense(native, weight.planes["weight"].data)
    group = weight.planes["scale"].span
    fits = group == _GROUP // 2 or (group % _GROUP == 0 and (group // _GROUP).bit_count() == 1)
    if not fits or weight.in_features % group or weight.in_features % _GROUP:
        return _dense(native, weight.dequantize(torch.float32))
    bits, planes = (4 if weight.format == "int4" else 8), weight.planes
    columns = weight.in_features
    codes = _packed(native, structs.KINDS[weight.format], planes["q"].data, columns, columns * bits // 8)
    scales = [_by_block(planes[name].data) for name in ("scale", "bias") if name in planes]
    struct = structs.Weight(
        kind=structs.KINDS[weight.format],
        rows=weight.out_features,
        columns=columns,
        group=group,
        codes=pointer(codes),
        scales=pointer(scales[0]),
        biases=pointer(scales[1]) if len(scales) > 1 else None,
    )
    return NativeWeight(struct, (codes, *scales))


def _dense(native: Native, matrix: Tensor) -> NativeWeight:
    kind = structs.KINDS[str(matrix.dtype).removeprefix("torch.")]
    rows, columns = matrix.shape
    codes = _packed(native, kind, matrix, columns, columns * matrix.element_size())
    struct = structs.Weight(kind=kind, rows=rows, columns=columns, group=_GROUP, codes=pointer(codes))
    return NativeWeight(struct, (codes,), matrix.dtype)


def _packed(native: Native, kind: int, data: Tensor, columns: int, row_bytes: int) -> Tensor:
    """Rows of `data` in blocks of 8, some blocks at a time on every core."""
    data = data.contiguous()
    rows = data.shape[0]
    out = lazy_zeros((-(-rows // _ROW_BLOCK) * _ROW_BLOCK * row_bytes,), torch.uint8)

    def pack_some(first: int) -> None:
        count = min(_ROWS_AT_ONCE, rows - first)
        source, target = data[first:].data_ptr(), out.data_ptr() + first * row_bytes
        native.library.kvant_pack(kind, source, count, columns, target)

    with ThreadPoolExecutor(native.threads) as pool:
        list(pool.map(pack_some, range(0, rows, _ROWS_AT_ONCE)))
    return out


def _by_block(values: Tensor) -> Tensor:
    """[rows, groups] -> [row blocks, groups, 8] float16, zero where there is no row."""
    padded = F.pad(values.half(), (0, 0, 0, -values.shape[0] % _ROW_BLOCK))
    blocks: Tensor = padded.unflatten(0, (-1, _ROW_BLOCK)).transpose(1, 2).contiguous()
    return blocks
