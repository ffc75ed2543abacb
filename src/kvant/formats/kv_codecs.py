"""How one vector of the KV cache, a key or a value of one token and KV head, becomes stored arrays and back.

Every codec is append-only: it sees each token by itself, so what is written for a token never depends on its
neighbours, and a prefix-cache hit gives the very bytes of a miss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
import torch.nn.functional as F
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
    constant vector has scale 0 and decodes to its zero. 4-bit codes are paired along head_dim (element 2i in the
    low nibble), so that a new token never shares a byte with an older one.
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
        steps = torch.where(scale > 0, (x - zero.float()) / step, 0.0)
        codes = steps.round().clamp(0, levels).to(torch.uint8)
        return {"codes": _paired(codes) if self.bits == 4 else codes, "affine": torch.cat([scale, zero], dim=-1)}

    def decode(self, planes: Planes, positions: Tensor, stats: LayerStats) -> Tensor:
        codes = _unpaired(planes["codes"]) if self.bits == 4 else planes["codes"]
        scale, zero = planes["affine"].float().unsqueeze(-2).unbind(-1)
        return codes.float() * scale + zero


@dataclass(frozen=True)
class GroupedCodec(VectorCodec):
    """4-bit integers in groups, whose scale and zero share 16 bits: x = (code - 7.5 - offset) * scale.

    For vectors without outliers, spread about zero, as a rotation makes them. A word of `words` has in its high 10 bits
    the scale, a float16 without its sign and the last 5 bits of its mantissa, and in its low 6 bits 8 * offset + 32:
    offsets are eighths of a step, from -4 to 3.875. So two groups take as much as one scale and zero in float16, and
    their steps are a tenth finer. Codes are paired as in `AffineCodec`.

    Where the layer has `feedback`, elements are rounded one after the other, and the later ones make up for the error
    of the earlier ones in what queries see of the vector.
    """

    groups: int

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        if head_dim % (2 * self.groups):
            raise ConfigError(f"4-bit vectors in {self.groups} groups need a head_dim that {2 * self.groups} divides")
        return Plane("codes", torch.uint8, (head_dim // 2,)), Plane("words", torch.int16, (self.groups,))

    def encode(self, x: Tensor, positions: Tensor, stats: LayerStats) -> Planes:
        x = x.float().unflatten(-1, (self.groups, -1))
        low, high = x.amin(-1), x.amax(-1)
        # Wide enough for the span, and for its middle to be within reach of an offset.
        span = (high / 2 - low / 2) / 7.5
        step = torch.maximum(span, (high / 2 + low / 2).abs() / 3.875).clamp(max=_WIDEST)
        bits = -(-step.half().view(torch.int16).int() // 32)
        scale = _scale_of(bits)
        eighths = ((-low / torch.where(scale > 0, scale, 1.0) - 7.5) * 8).round().clamp(-32, 31)
        size = x.shape[-1]
        scales, shifts = (t.repeat_interleave(size, dim=-1) for t in (scale, 7.5 + eighths / 8))
        codes = _round(x.flatten(-2), scales, shifts, stats.feedback).to(torch.uint8)
        return {"codes": _paired(codes), "words": (bits * 64 + eighths.int() + 32).to(torch.int16)}

    def decode(self, planes: Planes, positions: Tensor, stats: LayerStats) -> Tensor:
        words = planes["words"].int() & 0xFFFF
        scale, offset = _scale_of(words >> 6).unsqueeze(-1), ((words & 63) - 32).unsqueeze(-1) / 8
        codes = _unpaired(planes["codes"]).float().unflatten(-1, (self.groups, -1))
        x: Tensor = (codes - 7.5 - offset) * scale
        return x.flatten(-2)


_HUGE = 1e30  # float32 that a rotation can still add up
_WIDEST = 63488.0  # the largest float16 whose last 5 bits of mantissa are 0


def _scale_of(bits: Tensor) -> Tensor:
    """The float32 that the 10 high bits of a positive float16, as an integer, stand for."""
    return (bits * 32).to(torch.int16).view(torch.float16).float()


def _paired(codes: Tensor) -> Tensor:
    """4-bit codes two to a byte, the even element below."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _unpaired(codes: Tensor) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)


def _round(x: Tensor, scale: Tensor, shift: Tensor, feedback: Tensor | None) -> Tensor:
    """4-bit codes of x: x / scale + shift, rounded; all [kv_heads, tokens, head_dim]. A scale of 0 counts as 1."""
    step = torch.where(scale > 0, scale, 1.0)
    if feedback is None:
        return (x / step + shift).round().clamp(0, 15)
    # Element first: what is still to be rounded lies together.
    left, step, scale, shift = (t.permute(2, 0, 1).contiguous() for t in (x.clone(), step, scale, shift))
    weights, codes = feedback.permute(1, 2, 0).unsqueeze(-1), torch.empty_like(left)
    for i in range(len(left)):
        aim = left[i] / step[i] + shift[i]
        codes[i] = aim.round().clamp(0, 15)
        left[i + 1 :] -= (aim - codes[i]) * scale[i] * weights[i, i + 1 :]
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
            "a static KV-cache format needs scales; measure them with `kvant calibrate MODEL --kv -o DIR`, and name "
            "DIR, or a file of scales, with quantization_param_path"
        )
    return stats.scale.view(-1, 1, 1)


@dataclass(frozen=True)
class ShapedCodec(VectorCodec):
    """A vector that is given a better shape for few bits before another codec stores it.

    Its centre is subtracted and its elements are balanced, where the layer has a centre and a balance (`LayerStats`).
    Then a Hadamard matrix spreads outliers evenly. Every step is undone by decoding; none depends on other tokens.
    """

    inner: VectorCodec

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return self.inner.planes(head_dim)

    def encode(self, x: Tensor, positions: Tensor, stats: LayerStats) -> Planes:
        return self.inner.encode(self.shaped(x, positions, stats), positions, stats)

    def shaped(self, x: Tensor, positions: Tensor, stats: LayerStats) -> Tensor:
        """The vectors as `inner` gets them, float32; arguments as those of `encode`."""
        x = x.float().clamp(-_HUGE, _HUGE)
        if stats.centre is not None:
            x = x - stats.centre.at(positions)
        return hadamard(x if stats.balance is None else x * stats.balance.unsqueeze(1))

    def decode(self, planes: Planes, positions: Tensor, stats: LayerStats) -> Tensor:
        x = self.inner.decode(planes, positions, stats)
        x = hadamard(x)
        x = x if stats.balance is None else x / stats.balance.unsqueeze(1)
        return x if stats.centre is None else x + stats.centre.at(positions)


def hadamard(x: Tensor) -> Tensor:
    """x [..., size] times an orthonormal, symmetric matrix of equal magnitudes: applied twice, it gives x back.

    The matrix is Sylvester's, in blocks of the largest power of two that divides size. A row's result does not depend
    on the other rows: BLAS picks its kernel by their number, and those for multiples of 4 sum in the same order.
    """
    size = x.shape[-1]
    rows = x.reshape(-1, size)
    padded = F.pad(rows, (0, 0, 0, -len(rows) % 4))
    rotated: Tensor = (padded @ _sylvester(size).to(x.device, x.dtype))[: len(rows)]
    return rotated.view(x.shape)


@cache
def _sylvester(size: int) -> Tensor:
    block = torch.ones(1, 1, device="cpu")
    while size % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], dim=1), torch.cat([block, -block], dim=1)])
    matrix: Tensor = torch.block_diag(*[block / len(block) ** 0.5] * (size // len(block)))
    return matrix
