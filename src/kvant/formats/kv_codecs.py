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

from kvant.errors import ConfigError
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
        """The arrays that hold one vector of `head_dim` elements; the first has its codes, head_dim / 2 bytes or more.

        Raises:
            ConfigError: vectors of this size cannot be stored.
        """

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

    Where the layer has `feedback`, elements are rounded one after the other, and the later ones make up for the error
    of the earlier ones in what queries see of the vector.
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
        codes = _round((x - zero.float()) / step, levels, stats.feedback)
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


def _round(x: Tensor, levels: int, feedback: Tensor | None) -> Tensor:
    """x [kv_heads, tokens, head_dim], in steps, to whole numbers from 0 to `levels`."""
    if feedback is None:
        return x.round().clamp(0, levels)
    codes = x.permute(2, 0, 1).contiguous()  # element first: what is still to be rounded lies together
    weights = feedback.permute(1, 2, 0).unsqueeze(-1)
    for i, aim in enumerate(codes):
        code = aim.round().clamp(0, levels)
        codes[i + 1 :] -= (aim - code) * weights[i, i + 1 :]
        aim.copy_(code)
    return codes.permute(1, 2, 0)


@dataclass(frozen=True)
class SymmetricCodec(VectorCodec):
    """8-bit integers around zero, one float16 scale over the whole vector: x = code * scale, |code| <= 127."""

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return Plane("codes", torch.int8, (head_dim,)), Plane("scale", torch.float16, (1,))

    def encode(self, x: Tensor, positions: Tensor, stats: LayerStats) -> Planes:
        x = x.float()
        limit = torch.finfo(torch.float16).max
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(max=limit).half()
        step = torch.where(scale > 0, scale.float(), 1.0)
        codes = (x / step).round().clamp(-127, 127)
        return {"codes": torch.where(scale > 0, codes, 0).to(torch.int8), "scale": scale}

    def decode(self, planes: Planes, positions: Tensor, stats: LayerStats) -> Tensor:
        return planes["codes"].float() * planes["scale"].float()


@dataclass(frozen=True)
class StaticCodec(VectorCodec):
    """Codes of one byte whose scale was measured beforehand, for the layer or for each KV head: x = code * scale.

    What lies beyond the measured range saturates.

    Attributes:
        dtype: int8 (127 steps to the largest), float8_e4m3fn or float8_e5m2.
        per_head: whether each KV head has a scale of its own.
    """

    dtype: torch.dtype
    per_head: bool = False

    @property
    def largest(self) -> float:
        """The largest code."""
        return 127.0 if self.dtype == torch.int8 else torch.finfo(self.dtype).max

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return (Plane("codes", self.dtype, (head_dim,)),)

    def encode(self, x: Tensor, positions: Tensor, stats: LayerStats) -> Planes:
        codes = (x.float() / _scale(stats)).clamp(-self.largest, self.largest)
        return {"codes": (codes.round() if self.dtype == torch.int8 else codes).to(self.dtype)}

    def decode(self, planes: Planes, positions: Tensor, stats: LayerStats) -> Tensor:
        return planes["codes"].float() * _scale(stats)


def _scale(stats: LayerStats) -> Tensor:
    """[kv_heads, 1, 1]."""
    if stats.scale is None:
        raise ConfigError(
            "a static KV-cache format needs scales; measure them with `kvant calibrate --kv`, or name a file of them "
            "with quantization_param_path"
        )
    return stats.scale.view(-1, 1, 1)


@dataclass(frozen=True)
class ShapedCodec(VectorCodec):
    """A vector that is given a better shape for few bits before another codec stores it.

    Its centre is subtracted (`LayerStats.centre`); if `rotated`, it is balanced (`LayerStats.balance`) and rotated by a
    Hadamard matrix, which spreads outliers evenly. Every step is undone by decoding; none depends on other tokens.
    """

    inner: VectorCodec
    rotated: bool = False

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return self.inner.planes(head_dim)

    def encode(self, x: Tensor, positions: Tensor, stats: LayerStats) -> Planes:
        x = x.float()
        if stats.centre is not None:
            x = x - stats.centre.at(positions)
        if self.rotated:
            x = x if stats.balance is None else x * stats.balance.unsqueeze(1)
            x = hadamard(x)
        return self.inner.encode(x, positions, stats)

    def decode(self, planes: Planes, positions: Tensor, stats: LayerStats) -> Tensor:
        x = self.inner.decode(planes, positions, stats)
        if self.rotated:
            x = hadamard(x)
            x = x if stats.balance is None else x / stats.balance.unsqueeze(1)
        return x if stats.centre is None else x + stats.centre.at(positions)


def hadamard(x: Tensor) -> Tensor:
    """x [..., size] times an orthonormal, symmetric matrix of equal magnitudes: applied twice, it gives x back.

    The matrix is Sylvester's, in blocks of the largest power of two that divides size. Only sums and differences are
    taken, so that a row's result does not depend on the other rows.
    """
    size = x.shape[-1]
    block = size & -size
    width = 1
    while width < block:
        first, second = x.unflatten(-1, (-1, 2, width)).unbind(-2)
        x = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        width *= 2
    rotated: Tensor = x / block**0.5
    return rotated
