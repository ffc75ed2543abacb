"""A linear layer's weight as named planes; slicing and fusing work on any format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from kvant.errors import CorruptModelError

_ELEMENTS_AT_ONCE = 1 << 18  # expanded together: float32 that stays in a core's cache


@dataclass(frozen=True)
class WeightPlane:
    """One array of a weight: `data` is [N, ...], output dimension first; one of its columns spans `span` inputs."""

    data: Tensor
    span: int


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's matrix [N, K] = [out_features, in_features] in some format.

    All planes are output-dimension first, so that fusing projections and slicing them for tensor parallelism are
    written once, here. The formats and their planes:

    - "dense": "weight" [N, K], any float dtype.
    - "int4", "int8": codes "q" uint8, [N, K / 2] (column 2i in the low nibble of byte i) or [N, K]; "scale" [N,
      K / group] float16; maybe "bias", as "scale". A value is q * scale + bias, or without a bias
      (q - 2^(bits - 1)) * scale.
    """

    format: str
    in_features: int
    planes: dict[str, WeightPlane]

    @classmethod
    def dense(cls, weight: Tensor) -> PackedWeight:
        """A plain matrix [out_features, in_features] of any float dtype."""
        return cls("dense", weight.shape[1], {"weight": WeightPlane(weight, 1)})

    @classmethod
    def quantized(cls, bits: int, q: Tensor, scale: Tensor, bias: Tensor | None = None) -> PackedWeight:
        """A matrix of 4- or 8-bit codes from its planes; the group is as many columns as a scale stands for."""
        columns = q.shape[1] * 8 // bits
        group = columns // scale.shape[1]
        planes = {"q": WeightPlane(q, 8 // bits), "scale": WeightPlane(scale, group)}
        if bias is not None:
            planes["bias"] = WeightPlane(bias, group)
        return cls(f"int{bits}", columns, planes)

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return next(iter(self.planes.values())).data.shape[0]

    @property
    def bits(self) -> int:
        """Of a code, or of an element of a dense weight."""
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

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values [N, K], computed in float32 and rounded to `dtype`; a dense weight of that dtype is not copied."""
        if self.format == "dense":
            return self.planes["weight"].data.to(dtype)
        values = torch.empty(self.out_features, self.in_features, dtype=dtype)
        step = max(1, _ELEMENTS_AT_ONCE // max(1, self.in_features))
        for first in range(0, self.out_features, step):
            rows = slice(first, first + step)
            values[rows] = _values(self.rows(rows))
        return values

    def rows(self, index: slice | Tensor) -> PackedWeight:
        """The same weight with only these output rows, in this order."""
        return replace(self, planes={name: replace(p, data=p.data[index]) for name, p in self.planes.items()})

    def columns(self, start: int, stop: int) -> PackedWeight:
        """The same weight over the inputs [start, stop); both must fall on every plane's span."""
        planes = {}
        for name, plane in self.planes.items():
            if start % plane.span or stop % plane.span:
                raise ValueError(f"columns {start}:{stop} cut through a group of {plane.span} in plane {name!r}")
            planes[name] = replace(plane, data=plane.data[:, start // plane.span : stop // plane.span])
        return replace(self, in_features=stop - start, planes=planes)

    @staticmethod
    def concat(parts: Sequence[PackedWeight]) -> PackedWeight:
        """One weight whose outputs are the parts' outputs in order (fused qkv, gate and up).

        Parts of different formats are brought to one that holds the values of each exactly: the most bits, the smallest
        group, a bias if any has one. Beside a dense part all become dense, in its dtype.

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
        return replace(parts[0], planes=fused)


def pair(codes: Tensor) -> Tensor:
    """4-bit codes [N, K] uint8 -> two to a byte, the even column below: [N, K / 2]."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _codes(weight: PackedWeight) -> Tensor:
    """[N, K] uint8."""
    q = weight.planes["q"].data
    return q if weight.bits == 8 else torch.stack([q & 15, q >> 4], dim=-1).flatten(1)


def _values(weight: PackedWeight) -> Tensor:
    """A quantized weight's values, float32 [N, K]."""
    scale, bias = weight.planes["scale"].data, weight.planes.get("bias")
    codes = _codes(weight).float().unflatten(1, (scale.shape[1], weight.group_size))
    if bias is None:
        codes.sub_(_middle(weight.bits)).mul_(scale.float().unsqueeze(-1))
    else:
        codes.mul_(scale.float().unsqueeze(-1)).add_(bias.data.float().unsqueeze(-1))
    values: Tensor = codes.flatten(1)
    return values


def _middle(bits: int) -> int:
    """The code of zero where there is no bias."""
    return 1 << (bits - 1)


def _alike(parts: Sequence[PackedWeight]) -> Sequence[PackedWeight]:
    """The parts in one format, as `PackedWeight.concat` says."""
    layouts = [(part.format, {name: plane.span for name, plane in part.planes.items()}) for part in parts]
    if all(layout == layouts[0] for layout in layouts):
        return parts
    for part in parts:
        if part.format == "dense":
            return _expanded(parts, part.planes["weight"].data.dtype)
    bits, group = max(part.bits for part in parts), gcd(*(part.group_size for part in parts))
    widened = [_with_group(part, group) for part in parts]
    if any("bias" in part.planes for part in parts):
        widened = [_with_bias(part) for part in widened]
        if not all(part.planes["bias"].data.isfinite().all() for part in widened):
            return _expanded(parts, torch.float32)
    return [_with_bits(part, bits) for part in widened]


def _expanded(parts: Sequence[PackedWeight], dtype: torch.dtype) -> list[PackedWeight]:
    return [PackedWeight.dense(part.dequantize(dtype)) for part in parts]


def _with_group(weight: PackedWeight, group: int) -> PackedWeight:
    """In smaller groups, each with its former group's scale and bias."""
    times = weight.group_size // group
    repeated = {
        name: WeightPlane(plane.data.repeat_interleave(times, dim=1), group)
        for name, plane in weight.planes.items()
        if name != "q"
    }
    return replace(weight, planes=weight.planes | repeated)


def _with_bias(weight: PackedWeight) -> PackedWeight:
    """With a bias in place of the code that means zero; exact unless float16 overflows."""
    if "bias" in weight.planes:
        return weight
    scale = weight.planes["scale"]
    return replace(weight, planes=weight.planes | {"bias": replace(scale, data=scale.data * -_middle(weight.bits))})


def _with_bits(weight: PackedWeight, bits: int) -> PackedWeight:
    """With codes of 8 bits, if that is what `bits` says."""
    if weight.bits == bits:
        return weight
    shift = 0 if "bias" in weight.planes else _middle(bits) - _middle(weight.bits)
    return replace(
        weight, format=f"int{bits}", planes=weight.planes | {"q": WeightPlane(_codes(weight) + shift, 8 // bits)}
    )
