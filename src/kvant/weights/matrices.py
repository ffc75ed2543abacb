"""A checkpoint's matrices in the form that a model runs with: as they are stored, expanded, or rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvant.formats.weight import PackedWeight
from kvant.weights.codecs.plain import read_weight
from kvant.weights.source import TensorSource


@dataclass(frozen=True)
class Rounding:
    """How matrices are quantized as they are read, whatever they are stored as.

    Attributes:
        name: tells it from others.
        bits: that an element takes afterwards, scales included.
        quantize: [N, K] float32 to its quantized form.
    """

    name: str
    bits: float
    quantize: Callable[[Tensor], PackedWeight]


@dataclass(frozen=True)
class MatrixReader:
    """Reads one matrix after the other.

    Attributes:
        dtype: of the values that are not kept in fewer bits.
        weights: "auto", "dense" or a rounding, see `EngineConfig.weights`.
        packed: whether the backend computes on quantized weights; for others they are expanded to `dtype`.
    """

    source: TensorSource
    dtype: torch.dtype
    weights: str | Rounding
    packed: bool

    def read(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        """The matrix `name`.weight of this shape [out_features, in_features].

        Raises:
            CorruptModelError: it is missing or has another shape.
        """
        if isinstance(self.weights, Rounding):
            weight = self.weights.quantize(self.source.checked(f"{name}.weight", shape, torch.float32))
            return weight if self.packed else PackedWeight.dense(weight.dequantize(self.dtype))
        stored = self.source.checked_packed(f"{name}.weight", shape) if self.weights == "auto" else None
        # One that rounds its inputs too is more than its values.
        if stored is None or not (self.packed or stored.inputs):
            return read_weight(self.source, name, shape, self.dtype)
        return stored

    def peak_bytes(self) -> int:
        """What loading takes at most, the matrices that are fused left out."""
        shapes = self.source.shapes()
        elements = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        kept = sum(self._bits(name, len(shapes[name])) * count / 8 for name, count in elements.items())
        # A matrix that is rounded lies there in float32 too.
        largest = max(elements.values(), default=0) if isinstance(self.weights, Rounding) else 0
        return int(kept) + largest * torch.float32.itemsize

    @property
    def _keeps_blocks(self) -> bool:
        return self.packed and self.weights == "auto"

    def _bits(self, name: str, dimensions: int) -> float:
        """That an element of a tensor takes."""
        if self.packed and dimensions == 2:
            if isinstance(self.weights, Rounding):
                return self.weights.bits
            if self._keeps_blocks and (stored := self.source.packed_bits(name)) is not None:
                return stored
        return self.dtype.itemsize * 8
