"""16 and 32-bit weights: the matrix itself."""

from __future__ import annotations

import torch
from torch import Tensor

from kvant.formats.weight import PackedWeight
from kvant.weights.source import TensorSource


def read_weight(source: TensorSource, name: str, shape: tuple[int, int], dtype: torch.dtype) -> PackedWeight:
    """The matrix `name`.weight of this shape [out_features, in_features], as dense values."""
    return PackedWeight.dense(source.checked(f"{name}.weight", shape, dtype))


def read_vector(source: TensorSource, name: str, size: int, dtype: torch.dtype) -> Tensor | None:
    """A bias or norm weight [size], or None where the checkpoint has none."""
    return source.checked(name, (size,), dtype) if name in source.shapes() else None
