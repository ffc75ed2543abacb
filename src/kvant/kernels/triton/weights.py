"""Matrices in the layouts that the kernels like."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvant.formats.weight import InputCodes, PackedWeight

WORDS = 64  # of a row in a span: 128 bytes, a line of memory
QUARTER = WORDS // 4  # words: the least depth of a product on tensor cores
ROW_PADDING = 128  # bytes: what the columns of `RowCodes` are a multiple of
_SMALLEST_GROUP = 16
_LEAST_ARRIVALS = 64
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class Dense:
    """A plain matrix [N, K]; `inputs` is how inputs are rounded before the product, if they are."""

    matrix: Tensor
    inputs: InputCodes | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """[out_features, in_features]."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of it on the device."""
        return self.matrix.nbytes


@dataclass(frozen=True, eq=False)
class SpanCodes:
    """A matrix of codes of few bits. Its columns are cut into spans of 256 (4 bits) or 128 (8 bits).

    A span of a row is 64 words of 16 bits. Word j holds the codes of the span's columns j, 64 + j, ..., the first in
    its lowest bits: the same bits of all words are 64 neighbouring columns. So codes are never moved between registers,
    and the inputs that they are multiplied with lie in whole lines of memory. A loop over K takes a span at a time, or
    one or two quarters of it.

    What a group's codes stand for lies in words of 32 bits, two float16 in each: the least that is copied to shared
    memory while a loop computes. Loaded any other way, each step of a loop would wait for memory.

    Attributes:
        bits: of a code, 4 or 8.
        group: columns that share a scale, a power of two >= 16.
        kind: "zero", a value is (q - zero) * scale; "bias", q * scale + bias; "pair", (q - 2^(bits - 1)) * scale.
        words: [spans, N, 64] int16; codes of columns that are only there to fill the last span are zero.
        steps: [groups, N] int32, a scale in the low half and a zero or bias in the high one; of "pair" [groups / 2, N],
            the scales of an even group and of the one behind it, or of groups below 64 the one 64 columns behind it.
        unit: a power of two that scales and biases are to be multiplied with: without it float16 might not hold them.
            Those of float32 are rounded to it, by 2^-12 at most.
        order: [K] int64, stored column j is input order[j]; None where they are in order.
        inputs: how inputs are rounded before the product, if they are.
        arrivals: int32 zeros, as they are between launches: parts of a sum over K count there who comes last. So one
            launch at a time may use a weight.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    kind: str
    words: Tensor
    steps: Tensor
    unit: float
    order: Tensor | None
    inputs: InputCodes | None
    arrivals: Tensor

    @property
    def span(self) -> int:
        """Columns of a span."""
        return span_of(self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes of it on the device."""
        return _nbytes(self.words, self.steps, self.order, self.arrivals)


@dataclass(frozen=True, eq=False)
class RowCodes:
    """A matrix of signed 8-bit codes for inputs that are rounded to 8 bits: code * scale.

    Attributes:
        codes: [N, columns] int8; columns is K or more, zero from K on.
        scale: [N] float32.
        inputs: how inputs are rounded.
        order, arrivals: as of `SpanCodes`.
    """

    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    order: Tensor | None
    inputs: InputCodes
    arrivals: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of it on the device."""
        return _nbytes(self.codes, self.scale, self.order, self.arrivals)


TritonWeight = Dense | SpanCodes | RowCodes


def span_of(bits: int) -> int:
    """Columns of a span of codes."""
    return WORDS * (16 // bits)


def prepare(weight: PackedWeight, device: torch.device) -> TritonWeight:
    """A weight of any format on the device; what has no kernel, a group that 16 does not divide, becomes float32."""
    weight = weight.to(device).planar()
    planes = {name: plane.data for name, plane in weight.planes.items()}
    inputs = _inputs_on(weight.inputs, device)
    if weight.format == "dense":
        return Dense(planes["weight"].contiguous(), inputs)
    group = _fitting_group(weight)
    if group is None:
        return Dense(weight.dequantize(torch.float32), inputs)
    order = weight.order
    if inputs is not None and _is_signed_by_row(weight):
        return _row_codes(weight, planes, order, inputs)
    return _span_codes(weight, planes, group, order, inputs)


def _fitting_group(weight: PackedWeight) -> int | None:
    """The largest power of two that the weight can be given in groups of; None if it is below 16."""
    if weight.planes["scale"].data.shape[1] == 1:  # it ends where the row does, however large it is said to be
        return max(_SMALLEST_GROUP, 1 << (weight.in_features - 1).bit_length())
    group = weight.group_size & -weight.group_size
    return group if group >= _SMALLEST_GROUP else None


def _is_signed_by_row(weight: PackedWeight) -> bool:
    planes = weight.planes
    return weight.bits == 8 and planes["scale"].data.shape[1] == 1 and not {"zero", "bias"} & planes.keys()


def _row_codes(weight: PackedWeight, planes: dict[str, Tensor], order: Tensor | None, inputs: InputCodes) -> RowCodes:
    shape = weight.out_features, weight.in_features
    signed = (planes["q"] ^ 128).view(torch.int8)
    codes = F.pad(signed, (0, -shape[1] % ROW_PADDING)).contiguous()
    return RowCodes(shape, codes, planes["scale"][:, 0].float().contiguous(), order, inputs, _arrivals(codes, shape[0]))


def _span_codes(
    weight: PackedWeight, planes: dict[str, Tensor], group: int, order: Tensor | None, inputs: InputCodes | None
) -> SpanCodes:
    shape = weight.out_features, weight.in_features
    span = span_of(weight.bits)
    spans = -(-shape[1] // span)
    words = torch.empty(spans, shape[0], WORDS, dtype=torch.int16, device=planes["q"].device)
    for rows, part in _some_rows(planes["q"], spans * span * weight.bits // 8):
        words[:, rows] = _words(part, weight.bits, spans).transpose(0, 1)
    kind = "zero" if "zero" in planes else "bias" if "bias" in planes else "pair"
    meant = [_by_group(planes[name], weight, group) for name in ("scale", kind) if name in planes]
    steps, unit = _steps(max(1, WORDS // group), *meant)
    return SpanCodes(
        shape, weight.bits, group, kind, words, steps, unit, order, inputs, _arrivals(words, shape[0])
    )  # fmt: skip


def _steps(apart: int, scale: Tensor, other: Tensor | None = None) -> tuple[Tensor, float]:
    """Scales [groups, N] and zeros (bytes) or biases, or pairs of scales, in words [groups or half of them, N].

    The groups of a pair are so many `apart`.
    """
    shared = [scale] if other is None or other.dtype == torch.uint8 else [scale, other]
    unit = _unit(shared)
    if other is None:
        missing = -len(scale) % (2 * apart)
        pairs = torch.cat([scale, scale[-1:].expand(missing, -1)]).unflatten(0, (-1, 2, apart))
        scale, other = pairs[:, 0].flatten(0, 1), pairs[:, 1].flatten(0, 1).float() / unit
    elif len(shared) > 1:
        other = other.float() / unit
    low, high = (x.half().view(torch.int16).int() for x in (scale.float() / unit, other))
    return (low & 0xFFFF) | (high << 16), unit


def _unit(values: list[Tensor]) -> float:
    """1 for float16; else the power of two that makes the largest about 100: times a code, float16 holds that."""
    if all(x.dtype == torch.float16 for x in values):
        return 1.0
    largest = max(float(x.abs().amax()) for x in values)
    return 2.0 ** (math.frexp(largest)[1] - 7) if 0 < largest < math.inf else 1.0


def _some_rows(q: Tensor, row_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the codes, some at a time, zeros behind each up to so many bytes."""
    for first in range(0, q.shape[0], _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        yield rows, F.pad(q[rows], (0, row_bytes - q.shape[1]))


def _words(q: Tensor, bits: int, spans: int) -> Tensor:
    """Bytes as `PackedWeight` has them, [rows, bytes] -> [rows, spans, 64] int16."""
    codes = q.int() if bits == 8 else torch.stack([q & 15, q >> 4], dim=-1).flatten(1).int()
    parts = codes.unflatten(1, (spans, 16 // bits, WORDS))
    shifts = torch.arange(0, 16, bits, dtype=torch.int32, device=q.device).unsqueeze(1)
    words: Tensor = (parts << shifts).sum(2, dtype=torch.int32)
    return words.to(torch.int16)


def _by_group(values: Tensor, weight: PackedWeight, group: int) -> Tensor:
    """[N, groups] -> [groups, N], repeated where the kernels' groups are smaller."""
    if values.shape[1] > 1:
        values = values.repeat_interleave(weight.group_size // group, dim=1)[:, : -(-weight.in_features // group)]
    return values.T.contiguous()


def _arrivals(codes: Tensor, rows: int) -> Tensor:
    return torch.zeros(max(_LEAST_ARRIVALS, -(-rows // 16)), dtype=torch.int32, device=codes.device)


def _inputs_on(inputs: InputCodes | None, device: torch.device) -> InputCodes | None:
    if inputs is None or inputs.scale is None:
        return inputs
    return InputCodes(inputs.scale.to(device))


def _nbytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
