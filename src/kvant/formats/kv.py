"""KV-cache formats: what is stored for a token, and how to turn vectors into it and back.

A `KVFormat` is a key codec and a value codec. Sizes (bytes per token, block bytes, tokens per budget) derive from
`planes()` alone. Codes are append-only: `encode` sees each token by itself, so what is written for a token never
depends on its neighbours, and a prefix-cache hit gives the very bytes of a miss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from kvant.errors import ConfigError

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


@dataclass(frozen=True)
class LayerStats:
    """What was measured once for one layer's keys or values (means, balance, static scales); may be empty.

    `values[name]` is a tensor whose first dimension is the KV head.
    """

    values: dict[str, Tensor] = field(default_factory=dict)


NO_STATS = LayerStats()


class VectorCodec(ABC):
    """How one vector (a key or a value of one token and KV head) is stored."""

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


@dataclass(frozen=True)
class KVShape:
    """How many vectors of which size a model keeps per token: one key and one value per layer and KV head."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class KVFormat:
    """A named pair of codecs, and the one home of every size that follows from them."""

    name: str
    key: VectorCodec
    value: VectorCodec
    summary: str

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        """Everything stored per token per KV head; names are prefixed "key." and "value."."""
        keys = (replace(p, name=f"key.{p.name}") for p in self.key.planes(head_dim))
        return *keys, *(replace(p, name=f"value.{p.name}") for p in self.value.planes(head_dim))

    def bytes_per_token(self, shape: KVShape) -> int:
        """Bytes one token takes in the whole model, metadata included."""
        return sum(plane.bytes for plane in self.planes(shape.head_dim)) * shape.num_kv_heads * shape.num_layers

    def bits_per_element(self, head_dim: int) -> float:
        """Stored bits per key or value element, metadata included."""
        return sum(plane.bytes for plane in self.planes(head_dim)) * 8 / (2 * head_dim)


def _same(name: str, codec: VectorCodec, summary: str) -> KVFormat:
    return KVFormat(name, codec, codec, summary)


KV_FORMATS: dict[str, KVFormat] = {
    fmt.name: fmt
    for fmt in (
        _same("fp32", FloatCodec(torch.float32), "exact; for comparisons"),
        _same("bf16", FloatCodec(torch.bfloat16), "16 bit, wide range"),
        _same("fp16", FloatCodec(torch.float16), "16 bit, fine steps"),
        _same("int8", AffineCodec(8), "asymmetric, per token and KV head, online"),
        _same("int4", AffineCodec(4), "asymmetric, per token and KV head, online"),
    )
}


_ALIASES = MappingProxyType({"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"})


def resolve_kv_format(name: str, compute_dtype: torch.dtype) -> KVFormat:
    """The format called `name`; "auto" is 16 bit: bf16 where the model computes in bfloat16, else fp16.

    Raises:
        ConfigError: no such format.
    """
    if name == "auto":
        name = "bf16" if compute_dtype == torch.bfloat16 else "fp16"
    name = _ALIASES.get(name, name)
    if name not in KV_FORMATS:
        raise ConfigError(f"kv_cache_dtype={name!r} is unknown; choose one of auto, {', '.join(KV_FORMATS)}")
    return KV_FORMATS[name]


@dataclass(frozen=True)
class KVLayer:
    """One layer's share of the pool, as the kernels see it.

    `planes[name]` is [num_blocks, num_kv_heads, block_size, *plane.shape]: the tokens of a head lie together.
    """

    format: KVFormat
    block_size: int
    planes: Planes
    key_stats: LayerStats = NO_STATS
    value_stats: LayerStats = NO_STATS

    def side(self, prefix: str) -> Planes:
        """The planes of one codec ("key" or "value") under the codec's own names."""
        start = f"{prefix}."
        return {name.removeprefix(start): plane for name, plane in self.planes.items() if name.startswith(start)}
