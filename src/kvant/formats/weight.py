"""A linear layer's weight as named planes; slicing and fusing work on any format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from kvant.errors import CorruptModelError

_ELEMENTS_AT_ONCE = 1 << 18  # expanded together: float32 that stays in a core's cache
BLOCK = 32  # columns of a block
BLOCK_BITS = MappingProxyType({"q4_0": 4, "q4_1": 4, "q8_0": 8})  # of a code


@dataclass(frozen=True)
class WeightPlane:
    """One array of a weight: `data` is [N, ...], output dimension first; one of its columns spans `span` inputs."""

    data: Tensor
    span: int


@dataclass(frozen=True)
class InputCodes:
    """W8A8: a layer's inputs are rounded to 8 bits too, x = code * scale with code from -127 to 127.

    Attributes:
        scale: [1] float32, measured beforehand; None takes each token's largest magnitude / 127.
    """

    scale: Tensor | None = None


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's matrix [N, K] = [out_features, in_features] in some format.

    All planes are output-dimension first, so that fusing projections and slicing them for tensor parallelism are
    written once, here. The formats and their planes:

    - "dense": "weight" [N, K], any float dtype.
    - "int4", "int8": codes "q" uint8, [N, K / 2] (column 2i in the low nibble of byte i) or [N, K]; "scale" [N,
      ceil(K / group)], a float type; maybe "zero" uint8 or "bias" float16, both as "scale". A value is (q - zero) *
      scale, or q * scale + bias, or without either (q - 2^(bits - 1)) * scale.
    - "q4_0", "q4_1", "q8_0", as GGML stores them: "blocks" uint8 [N, K / 32, 18, 20 or 34]. A block of 32 columns has a
      float16 scale, a float16 bias in "q4_1", and codes: two to a byte, the first 16 columns in low nibbles, or signed
      bytes. `planar` gives the same as "int4" or "int8".

    Attributes:
        order: [K] int64; stored column j is input order[j]. None: they are in order. Groups are of stored columns.
        inputs: how the layer's inputs are rounded, if they are.
    """

    format: str
    in_features: int
    planes: dict[str, WeightPlane]
    order: Tensor | None = None
    inputs: InputCodes | None = None

    @classmethod
    def dense(cls, weight: Tensor) -> PackedWeight:
        """A plain matrix [out_features, in_features] of any float dtype."""
        return cls("dense", weight.shape[1], {"weight": WeightPlane(weight, 1)})

    @classmethod
    def quantized(
        cls,
        bits: int,
        q: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        zero: Tensor | None = None,
        group_size: int | None = None,
    ) -> PackedWeight:
        """A matrix of 4- or 8-bit codes from its planes; its group is K / the number of scales unless it is given.

        A group that is given may leave a smaller one at the end of a row.
        """
        columns = q.shape[1] * 8 // bits
        group = columns // scale.shape[1] if group_size is None else group_size
        planes = {"q": WeightPlane(q, 8 // bits), "scale": WeightPlane(scale, group)}
        for name, data in (("bias", bias), ("zero", zero)):
            if data is not None:
                planes[name] = WeightPlane(data, group)
        return cls(f"int{bits}", columns, planes)

    @classmethod
    def in_blocks(cls, kind: str, blocks: Tensor) -> PackedWeight:
        """A matrix in GGML's blocks of one of `BLOCK_BITS`, [N, K / 32, bytes of a block] uint8, all numbers finite."""
        return cls(kind, blocks.shape[1] * BLOCK, {"blocks": WeightPlane(blocks, BLOCK)})

    def planar(self) -> PackedWeight:
        """The same weight, whose codes and scales are planes of their own."""
        if self.format not in BLOCK_BITS:
            return self
        blocks, size = self.planes["blocks"].data, BLOCK * self.bits // 8
        numbers, codes = blocks.split([blocks.shape[2] - size, size], dim=2)
        unsigned = codes ^ 128 if self.bits == 8 else torch.cat([codes & 15, codes >> 4], dim=2)
        q = unsigned.flatten(1) if self.bits == 8 else pair(unsigned.flatten(1))
        halves = numbers.contiguous().view(torch.float16).unbind(2)
        planes = {"q": WeightPlane(q, 8 // self.bits)}
        planes |= {name: WeightPlane(data, BLOCK) for name, data in zip(("scale", "bias"), halves, strict=False)}
        return replace(self, format=f"int{self.bits}", planes=planes)

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return next(iter(self.planes.values())).data.shape[0]

    @property
    def bits(self) -> int:
        """Of a code, or of an element of a dense weight."""
        if self.format in BLOCK_BITS:
            return BLOCK_BITS[self.format]
        data = next(iter(self.planes.values()))
        return data.data.itemsize * 8 // data.span

    @property
    def group_size(self) -> int:
        """How many inputs share a scale, and so the width that `columns` cuts by; 1 for a dense weight."""
        return max(plane.span for plane in self.planes.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(plane.data.nbytes for plane in self.planes.values())

    @property
    def codes(self) -> Tensor:
        """A quantized weight's codes, one a byte: [N, K] uint8."""
        q = self.planar().planes["q"].data
        return q if self.bits == 8 else unpair(q)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values [N, K], computed in float32 and rounded to `dtype`; a dense weight of that dtype is not copied."""
        if self.format == "dense":
            return self.planes["weight"].data.to(dtype)
        device = next(iter(self.planes.values())).data.device
        values = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        step = max(1, _ELEMENTS_AT_ONCE // max(1, self.in_features))
        for first in range(0, self.out_features, step):
            rows = slice(first, first + step)
            if self.order is None:
                values[rows] = _values(self.rows(rows))
            else:
                values[rows, self.order] = _values(self.rows(rows)).to(dtype)
        return values

    def to(self, device: torch.device) -> PackedWeight:
        """The same weight on another device; itself where it is there."""
        if next(iter(self.planes.values())).data.device == device:
            return self
        scale = None if self.inputs is None or self.inputs.scale is None else self.inputs.scale.to(device)
        return replace(
            self,
            planes={name: replace(p, data=p.data.to(device)) for name, p in self.planes.items()},
            order=None if self.order is None else self.order.to(device),
            inputs=None if self.inputs is None else InputCodes(scale),
        )

    def rows(self, index: slice | Tensor) -> PackedWeight:
        """The same weight with only these output rows, in this order."""
        return replace(self, planes={name: replace(p, data=p.data[index]) for name, p in self.planes.items()})

    def times(self, factors: Tensor) -> PackedWeight:
        """The same weight with each output row multiplied by a factor, [N]: rounded as its values or scales are."""
        weight = self.planar()
        changed = {
            name: replace(plane, data=(plane.data.float() * factors.unsqueeze(1)).to(plane.data.dtype))
            for name, plane in weight.planes.items()
            if name in ("weight", "scale", "bias")
        }
        return replace(weight, planes=weight.planes | changed)

    def columns(self, start: int, stop: int) -> PackedWeight:
        """The same weight over the inputs [start, stop); both must fall on every plane's span, or on the end.

        Raises:
            ValueError: they do not, or the columns are not stored in order.
        """
        if self.order is not None:
            raise ValueError("columns of a weight that are not stored in order cannot be sliced; expand it first")
        planes = {}
        for name, plane in self.planes.items():
            if start % plane.span or (stop % plane.span and stop != self.in_features):
                raise ValueError(f"columns {start}:{stop} cut through a group of {plane.span} in plane {name!r}")
            planes[name] = replace(plane, data=plane.data[:, start // plane.span : -(-stop // plane.span)])
        return replace(self, in_features=stop - start, planes=planes)

    def regrouped(self, group: int) -> PackedWeight:
        """The same values in smaller groups, of a size that divides this one's: each has its former group's scale."""
        weight, times, groups = self.planar(), self.group_size // group, -(-self.in_features // group)
        repeated = {
            name: WeightPlane(plane.data.repeat_interleave(times, dim=1)[:, :groups], group)
            for name, plane in weight.planes.items()
            if name != "q"
        }
        return replace(weight, planes=weight.planes | repeated)

    @staticmethod
    def concat(parts: Sequence[PackedWeight]) -> PackedWeight:
        """One weight whose outputs are the parts' outputs in order (fused qkv, gate and up).

        Parts of different formats are brought to one that holds the values of each exactly: the most bits, the smallest
        group, zero points or biases if any has them. Beside a dense part all become dense, in its dtype; where nothing
        else holds all, in float32. Of different static scales of the inputs, the largest is taken.

        Raises:
            CorruptModelError: they differ in input width.
        """
        if any(part.in_features != parts[0].in_features for part in parts):
            raise CorruptModelError("projections to be fused differ in input width")
        if len(parts) == 1:
            return parts[0]
        parts = _alike(parts)
        fused = {
            name: WeightPlane(torch.cat([part.planes[name].data for part in parts]), plane.span)
            for name, plane in parts[0].planes.items()
        }
        return replace(parts[0], planes=fused, inputs=_common_inputs(parts))


def pair(codes: Tensor) -> Tensor:
    """4-bit codes [N, K] uint8 -> two to a byte, the even column below: [N, K / 2]."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpair(q: Tensor) -> Tensor:
    """Bytes [..., n] uint8 -> the 4-bit codes in them, the low nibble first: [..., 2n]."""
    return torch.stack([q & 15, q >> 4], dim=-1).flatten(-2)


def _values(weight: PackedWeight) -> Tensor:
    """A quantized weight's values as its columns are stored, float32 [N, K]."""
    weight = weight.planar()
    scale, planes = weight.planes["scale"].data.float().unsqueeze(-1), weight.planes
    groups, group = scale.shape[1], weight.group_size
    codes = F.pad(weight.codes.float(), (0, groups * group - weight.in_features)).unflatten(1, (groups, group))
    if "bias" in planes:
        codes.mul_(scale).add_(planes["bias"].data.float().unsqueeze(-1))
    else:
        codes.sub_(planes["zero"].data.float().unsqueeze(-1) if "zero" in planes else _middle(weight.bits)).mul_(scale)
    values: Tensor = codes.flatten(1)[:, : weight.in_features]
    return values


def _middle(bits: int) -> int:
    """The code of zero where nothing else is said of it."""
    return 1 << (bits - 1)


def _alike(parts: Sequence[PackedWeight]) -> Sequence[PackedWeight]:
    """The parts in one format, as `PackedWeight.concat` says."""
    for part in parts:
        if part.format == "dense":
            return _expanded(parts, part.planes["weight"].data.dtype)
    if not _columns_alike(parts):
        return _expanded(parts, torch.float32)
    layouts = [(part.format, {name: plane.span for name, plane in part.planes.items()}) for part in parts]
    if all(layout == layouts[0] for layout in layouts):
        return parts
    parts = [part.planar() for part in parts]
    bits, group = max(part.bits for part in parts), gcd(*(part.group_size for part in parts))
    widened = [part.regrouped(group) for part in parts]
    has_bias, has_zero = (any(name in part.planes for part in parts) for name in ("bias", "zero"))
    if has_bias:
        widened = [_with_bias(part) for part in widened]
        # A zero point as a bias would be rounded.
        if has_zero or not all(part.planes["bias"].data.isfinite().all() for part in widened):
            return _expanded(parts, torch.float32)
    elif has_zero:
        widened = [_with_zero(part) for part in widened]
    return [_with_bits(part, bits) for part in widened]


def _columns_alike(parts: Sequence[PackedWeight]) -> bool:
    """Whether the parts take their inputs in the same order and round them in the same way."""
    order = parts[0].order
    if any((part.order is None) != (order is None) for part in parts):
        return False
    ordered = order is None or all(part.order is not None and torch.equal(part.order, order) for part in parts)
    return ordered and len({None if part.inputs is None else part.inputs.scale is None for part in parts}) == 1


def _common_inputs(parts: Sequence[PackedWeight]) -> InputCodes | None:
    scales = [part.inputs.scale for part in parts if part.inputs is not None and part.inputs.scale is not None]
    return InputCodes(torch.stack(scales).amax(0)) if scales else parts[0].inputs


def _expanded(parts: Sequence[PackedWeight], dtype: torch.dtype) -> list[PackedWeight]:
    return [PackedWeight.dense(part.dequantize(dtype)) for part in parts]


def _with_bias(weight: PackedWeight) -> PackedWeight:
    """With a bias in place of the code that means zero; exact unless float16 overflows."""
    if "bias" in weight.planes:
        return weight
    scale = weight.planes["scale"]
    return replace(weight, planes=weight.planes | {"bias": replace(scale, data=scale.data * -_middle(weight.bits))})


def _with_zero(weight: PackedWeight) -> PackedWeight:
    """With zero points that say what the code of zero is."""
    if "zero" in weight.planes:
        return weight
    zero = torch.full_like(weight.planes["scale"].data, _middle(weight.bits), dtype=torch.uint8)
    return replace(weight, planes=weight.planes | {"zero": replace(weight.planes["scale"], data=zero)})


def _with_bits(weight: PackedWeight, bits: int) -> PackedWeight:
    """With codes of 8 bits, if that is what `bits` says."""
    if weight.bits == bits:
        return weight
    shift = 0 if {"bias", "zero"} & weight.planes.keys() else _middle(bits) - _middle(weight.bits)
    return replace(
        weight, format=f"int{bits}", planes=weight.planes | {"q": WeightPlane(weight.codes + shift, 8 // bits)}
    )
