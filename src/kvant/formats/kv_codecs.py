"""How one vector of the KV cache, a key or a value of one token and KV head, becomes stored arrays and back.

Every codec is append-only: it sees each token by itself, so what is written for a token never depends on its
neighbours, and a prefix-cache hit gives the very bytes of a miss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kvant.formats.kv_stats import LayerStats

Planes = dict[str, Tensor]


@dataclass(frozen=True)
class Plane:
    """One stored array: `shape` elements of `dtype` for each token of each KV head."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes per token per KV head."""
        return prod(self.shape) * self.dtype.itemsize


class VectorCodec(ABC):
    """How one vector is stored."""

    @abstractmethod
    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        """The arrays that hold one vector of `head_dim` elements."""

    @abstractmethod
    def encode(self, x: Tensor, positions: Tensor, stats: LayerStats) -> Planes:
        """Codes of `x`.

        Args:
            x: [kv_heads, tokens, head_dim], any float dtype, finite; keys come after RoPE.
            positions: [tokens] int64, each token's position in its own sequence.
            stats: what was measured for this layer.

        Returns:
            For each plane name a tensor [kv_heads, tokens, *plane.shape].
        """

    @abstractmethod
    def decode(self, planes: Planes, positions: Tensor, stats: LayerStats) -> Tensor:
        """The inverse of `encode`, up to rounding: float32 [kv_heads, tokens, head_dim]."""


@dataclass(frozen=True)
class FloatCodec(VectorCodec):
    """The vector itself in a float type; values beyond its range saturate."""

    dtype: torch.dtype

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return (Plane("data", self.dtype, (head_dim,)),)

    def encode(self, x: Tensor, positions: Tensor, stats: LayerStats) -> Planes:
        limit = torch.finfo(self.dtype).max
        return {"data": x.float().clamp(-limit, limit).to(self.dtype)}

    def decode(self, planes: Planes, positions: Tensor, stats: LayerStats) -> Tensor:
        return planes["data"].float()


@dataclass(frozen=True)
class AffineCodec(VectorCodec):
    """Asymmetric integers, one scale and zero over the whole vector: x = code * scale + zero.

    `affine` holds (scale, zero) in float16, rounded *before* use, so that decoding uses what encoding used. A
    constant vector has scale 0 and decodes to its zero. 4-bit codes are paired along head_dim (element 2i in the low
    nibble), so that a new token never shares a byte with an older one.
    """

    bits: int

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        codes = Plane("codes", torch.uint8, (head_dim * self.bits // 8,))
        return codes, Plane("affine", torch.float16, (2,))

    def encode(self, x: Tensor, positions: Tensor, stats: LayerStats) -> Planes:
        levels = 2**self.bits - 1
        limit = torch.finfo(torch.float16).max
        x = x.float()
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        zero = low.clamp(-limit, limit).half()
        scale = ((high - zero.float()) / levels).clamp(0, limit).half()
        step = torch.where(scale > 0, scale.float(), 1.0)
        codes = ((x - zero.float()) / step).round().clamp(0, levels).to(torch.uint8)
        codes = torch.where(scale > 0, codes, 0).to(torch.uint8)
        if self.bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
        return {"codes": codes, "affine": torch.cat([scale, zero], dim=-1)}

    def decode(self, planes: Planes, positions: Tensor, stats: LayerStats) -> Tensor:
        codes = planes["codes"]
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        scale, zero = planes["affine"].float().unsqueeze(-2).unbind(-1)
        return codes.float() * scale + zero
