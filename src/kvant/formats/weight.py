"""`PackedWeight`: one matrix as planes that slice and concatenate alike, whatever the format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvant.errors import CorruptModelError


@dataclass(frozen=True)
class WeightPlane:
    """One array of a weight: `data` is [N, ...], output dimension first; one of its columns spans `span` inputs."""

    data: Tensor
    span: int


@dataclass(frozen=True)
class PackedWeight:
    """A linear layer's matrix [out_features, in_features] in some format.

    A dense weight has the single plane "weight" with span 1. Quantized formats add planes (q, scale, zero); since all
    are output-dimension first, fusing projections and slicing them for tensor parallelism are written once, here.
    """

    format: str
    in_features: int
    planes: dict[str, WeightPlane]

    @classmethod
    def dense(cls, weight: Tensor) -> PackedWeight:
        """A plain matrix [out_features, in_features] of any float dtype."""
        return cls("dense", weight.shape[1], {"weight": WeightPlane(weight, 1)})

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return next(iter(self.planes.values())).data.shape[0]

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
        """One weight whose outputs are the parts' outputs in order (fused qkv, gate and up)."""
        first = parts[0]
        if len(parts) == 1:
            return first
        if any((p.format, p.in_features) != (first.format, first.in_features) for p in parts):
            raise CorruptModelError("projections to be fused differ in format or input width")
        fused = {
            name: WeightPlane(torch.cat([part.planes[name].data for part in parts]), plane.span)
            for name, plane in first.planes.items()
        }
        return replace(first, planes=fused)
