"""Matrices in the kernels' layout (csrc/types.h)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from kvant.errors import CorruptModelError
from kvant.formats.memory import Slabs
from kvant.formats.threads import for_each
from kvant.formats.weight import BLOCK, BLOCK_BITS, PackedWeight
from kvant.kernels.cpu import structs
from kvant.kernels.cpu.native import Native, pointer

LAYOUT = 1  # of a packed weight's memory, for files that keep it: another wherever csrc/types.h has another

_ROW_BLOCK = 8
_GROUP = BLOCK  # columns, of GGML's blocks too
_ROWS_AT_ONCE = 256
_FLOATS = MappingProxyType({"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16})
# Of the largest scale: what float16 may make a scale differ by. Its own rounding is half of it.
_SCALE_ERROR = 2.0**-10


@dataclass(frozen=True, eq=False)
class NativeWeight:
    """A matrix for the kernels, and the memory that `struct` points to, by the names of its pointers."""

    struct: structs.Weight
    memory: Mapping[str, Tensor]

    @property
    def kind(self) -> str:
        """A float type, "int4" or "int8"."""
        return next(name for name, number in structs.KINDS.items() if number == self.struct.kind)

    @property
    def dtype(self) -> torch.dtype:
        """What its values are given in."""
        return _FLOATS.get(self.kind, torch.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """[out_features, in_features]."""
        return self.struct.rows, self.struct.columns


def native_weight(kind: str, rows: int, columns: int, group: int, memory: Mapping[str, Tensor]) -> NativeWeight:
    """A weight whose memory is laid out already, as `pack` does it.

    Raises:
        CorruptModelError: the memory is not what a weight of these sizes has, or the order of its columns does not name
            each of them once. The kernels read and write by both without looking.
    """
    expected = _memory_of(kind, rows, columns, group)
    found = {name: (data.dtype, tuple(data.shape)) for name, data in memory.items()}
    needed = {"codes"} if kind in _FLOATS else {"codes", "scales"}
    if not needed <= found.keys() or any(expected.get(name) != entry for name, entry in found.items()):
        raise CorruptModelError(f"the memory of a weight of {rows} x {columns} in {kind} is {found}, not {expected}")
    order = memory.get("order")
    if order is not None and not torch.equal(order.sort().values, torch.arange(columns, dtype=torch.int32)):
        raise CorruptModelError("the order of a weight's columns does not name each of them once")
    addresses = {name: pointer(data) for name, data in memory.items()}
    struct = structs.Weight(kind=structs.KINDS[kind], rows=rows, columns=columns, group=group, **addresses)
    return NativeWeight(struct, memory)


def _memory_of(kind: str, rows: int, columns: int, group: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of all memory that such a weight may have."""
    padded_rows = -(-rows // _ROW_BLOCK) * _ROW_BLOCK
    if kind in _FLOATS:
        return {"codes": (torch.uint8, (padded_rows * columns * _FLOATS[kind].itemsize,))}
    padded = -(-columns // _GROUP) * _GROUP
    fits = group == _GROUP // 2 or (group >= _GROUP and group.bit_count() == 1)
    if kind not in structs.KINDS or not fits:
        raise CorruptModelError(f"there is no weight of the kind {kind!r} in groups of {group}")
    per_group = padded_rows // _ROW_BLOCK, -(-padded // group), _ROW_BLOCK
    return {
        "codes": (torch.uint8, (padded_rows * padded * (4 if kind == "int4" else 8) // 8,)),
        "scales": (torch.float16, per_group),
        "biases": (torch.float16, per_group),
        "zeros": (torch.uint8, per_group),
        "order": (torch.int32, (columns,)),
    }


def pack(native: Native, weight: PackedWeight, slabs: Slabs) -> NativeWeight:
    """A weight in the kernels' layout, in memory of `slabs`; what they have no loop for becomes plain float32.

    That is a group that none of theirs divides, and scales or biases that float16 does not hold. Whether the inputs are
    to be rounded makes no difference: a quantized weight's always are, 32 together, and a plain one's need not be.

    Raises:
        CorruptModelError: the order of its columns does not name each of them once.
    """
    if weight.format == "dense":
        return _dense(native, weight.planes["weight"].data, slabs)
    if weight.format in BLOCK_BITS:
        return _blocks(native, weight, slabs)
    group = _fitting_group(weight)
    if group is None or not _fits_half(weight):
        return _dense(native, weight.dequantize(torch.float32), slabs)
    return _quantized(native, weight, group, slabs)


def _fitting_group(weight: PackedWeight) -> int | None:
    """The largest group of the kernels (16, or 32 times a power of two) that the weight can be given in."""
    groups, group = weight.planes["scale"].data.shape[1], weight.group_size
    if groups == 1:  # it ends where the row does, however large it is said to be
        return _GROUP << (-(-weight.in_features // _GROUP) - 1).bit_length()
    if group % _GROUP == 0:
        return group & -group
    return _GROUP // 2 if group % (_GROUP // 2) == 0 else None


def _fits_half(weight: PackedWeight) -> bool:
    bias = weight.planes.get("bias")
    return _scales_fit(weight.planes["scale"].data) and (bias is None or bool(bias.data.half().isfinite().all()))


def _scales_fit(scale: Tensor) -> bool:
    if scale.dtype is torch.float16:
        return bool(scale.isfinite().all())
    error = (scale.half().float() - scale.float()).abs().amax()
    return bool(error <= _SCALE_ERROR * scale.abs().amax())


def _quantized(native: Native, weight: PackedWeight, group: int, slabs: Slabs) -> NativeWeight:
    if group < weight.group_size and weight.planes["scale"].data.shape[1] > 1:
        weight = weight.regrouped(group)
    kind, bits, planes = structs.KINDS[weight.format], weight.bits, weight.planes
    padded = -(-weight.in_features // _GROUP) * _GROUP
    spans = -(-padded // group)
    q, row_bytes = planes["q"].data, padded * bits // 8
    if q.shape[1] < row_bytes:  # or else padding would copy it
        q = F.pad(q, (0, row_bytes - q.shape[1]))
    memory = {
        "codes": _packed(native, kind, q, padded, row_bytes, slabs),
        "scales": _by_block(planes["scale"].data.half(), spans, slabs),
    }
    if "bias" in planes:
        memory["biases"] = _by_block(planes["bias"].data.half(), spans, slabs)
    elif "zero" in planes and (planes["zero"].data != 1 << (bits - 1)).any():
        # Not a bias of -zero * scale: rounded to float16 that is off by up to 1/8 of a step in 8 bits.
        memory["zeros"] = _by_block(planes["zero"].data, spans, slabs)
    if weight.order is not None:
        memory["order"] = weight.order.to(torch.int32).contiguous()
    return native_weight(weight.format, weight.out_features, weight.in_features, group, memory)


def _blocks(native: Native, weight: PackedWeight, slabs: Slabs) -> NativeWeight:
    assert weight.order is None, "blocks have their columns in order"
    blocks, bits = weight.planes["blocks"].data.contiguous(), weight.bits
    rows, groups, _ = blocks.shape
    expected = _memory_of(f"int{bits}", rows, weight.in_features, _GROUP)
    names = ("codes", "scales", "biases") if weight.format == "q4_1" else ("codes", "scales")
    memory = {name: slabs.zeros(expected[name][1], expected[name][0]) for name in names}

    def pack_some(first: int) -> None:
        codes = memory["codes"].data_ptr() + first * weight.in_features * bits // 8
        halves = [memory[name].data_ptr() + first * groups * torch.float16.itemsize for name in names[1:]]
        scales, biases = (*halves, None)[:2]
        count = min(_ROWS_AT_ONCE, rows - first)
        native.library.kvant_pack_blocks(bits, blocks[first:].data_ptr(), count, groups, codes, scales, biases)

    for_each(pack_some, range(0, rows, _ROWS_AT_ONCE), rows * weight.in_features, native.threads)
    return native_weight(f"int{bits}", rows, weight.in_features, _GROUP, memory)


def _dense(native: Native, matrix: Tensor, slabs: Slabs) -> NativeWeight:
    name = str(matrix.dtype).removeprefix("torch.")
    rows, columns = matrix.shape
    codes = _packed(native, structs.KINDS[name], matrix, columns, columns * matrix.element_size(), slabs)
    return native_weight(name, rows, columns, _GROUP, {"codes": codes})


def _packed(native: Native, kind: int, data: Tensor, columns: int, row_bytes: int, slabs: Slabs) -> Tensor:
    """Rows of `data` in blocks of 8, some blocks at a time on every core."""
    data = data.contiguous()
    rows = data.shape[0]
    out = slabs.zeros((-(-rows // _ROW_BLOCK) * _ROW_BLOCK * row_bytes,), torch.uint8)

    def pack_some(first: int) -> None:
        count = min(_ROWS_AT_ONCE, rows - first)
        source, target = data[first:].data_ptr(), out.data_ptr() + first * row_bytes
        native.library.kvant_pack(kind, source, count, columns, target)

    for_each(pack_some, range(0, rows, _ROWS_AT_ONCE), rows * columns, native.threads)
    return out


def _by_block(values: Tensor, spans: int, slabs: Slabs) -> Tensor:
    """[rows, groups] -> [row blocks, spans, 8], zero where there is no row and no group."""
    lacking = (0, spans - values.shape[1], 0, -values.shape[0] % _ROW_BLOCK)
    padded = F.pad(values, lacking) if any(lacking) else values  # or else padding would copy it
    blocks = padded.unflatten(0, (-1, _ROW_BLOCK)).transpose(1, 2)
    return slabs.zeros(tuple(blocks.shape), blocks.dtype).copy_(blocks)
