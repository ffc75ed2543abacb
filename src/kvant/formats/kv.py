"""KV-cache formats: what each is called and made of, the sizes that follow, and one layer's memory in a format.

A `KVFormat` is a key codec and a value codec, and how many first tokens of a text (the attention sinks) are kept in 16
bit instead. A `KVPlan` says which layer has which format. Sizes (bytes per token, block bytes, tokens per budget)
derive from the codecs' planes alone.

A sequence's tokens lie in the slots of its blocks in order, token m in slot m + lead. The lead is 0, unless a layer
keeps sinks: one of these takes the code bytes of `SINK_SPAN` slots, so the first lead + sinks slots belong to them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from kvant.errors import ConfigError, NotFiniteError
from kvant.formats.kv_codecs import (
    AffineCodec,
    FloatCodec,
    GroupedCodec,
    Plane,
    Planes,
    ShapedCodec,
    StaticCodec,
    SymmetricCodec,
    VectorCodec,
)
from kvant.formats.kv_stats import NO_STATS, LayerStats

SINKS = 4
SINK_SPAN = 4  # slots whose codes hold one vector in 16 bit; enough for codes of 4 bits and more


@dataclass(frozen=True)
class KVShape:
    """How many vectors of which size a model keeps per token: one key and one value per layer and KV head."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class KVFormat:
    """A named pair of codecs, and the one home of every size that follows from them.

    Attributes:
        sinks: so many first tokens of a sequence are stored in float16 instead.
    """

    name: str
    key: VectorCodec
    value: VectorCodec
    summary: str
    sinks: int = 0

    @property
    def measured(self) -> bool:
        """Whether its codecs work with statistics of the model."""
        return isinstance(self.key, ShapedCodec | StaticCodec) or isinstance(self.value, StaticCodec)

    @property
    def lead(self) -> int:
        """Slots that the sinks take beyond one each."""
        return self.sinks * (SINK_SPAN - 1)

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        """Everything stored per token per KV head; names are prefixed "key." and "value."."""
        keys = (replace(p, name=f"key.{p.name}") for p in self.key.planes(head_dim))
        return *keys, *(replace(p, name=f"value.{p.name}") for p in self.value.planes(head_dim))

    def bytes_per_token(self, shape: KVShape) -> int:
        """Bytes one token takes in the whole model, metadata included."""
        return sum(plane.bytes for plane in self.planes(shape.head_dim)) * shape.num_kv_heads * shape.num_layers

    def bits_per_element(self, head_dim: int, context: int = 4096) -> float:
        """Stored bits per key or value element in a text of `context` tokens, metadata and sinks included."""
        per_token = sum(plane.bytes for plane in self.planes(head_dim)) * 8 / (2 * head_dim)
        return per_token * (context + self.lead) / context


def _same(name: str, codec: VectorCodec, summary: str, sinks: int = 0) -> KVFormat:
    return KVFormat(name, codec, codec, summary, sinks)


def _static(name: str, codec: StaticCodec, summary: str) -> KVFormat:
    return KVFormat(name, ShapedCodec(codec), codec, summary)


_INT4 = ShapedCodec(GroupedCodec(2))
_INT8_KEYS = ShapedCodec(AffineCodec(8))
_K8V4_VALUES = ShapedCodec(GroupedCodec(4))

KV_FORMATS: dict[str, KVFormat] = {
    fmt.name: fmt
    for fmt in (
        _same("fp32", FloatCodec(torch.float32), "exact; for comparisons"),
        _same("bf16", FloatCodec(torch.bfloat16), "16 bit, wide range"),
        _same("fp16", FloatCodec(torch.float16), "16 bit, fine steps"),
        KVFormat("int8", _INT8_KEYS, AffineCodec(8), "8 bit, keys centred; very close to 16 bit"),
        _same("int4", _INT4, "4 bit, keys centred, first 4 tokens in 16 bit; small loss", SINKS),
        KVFormat("k8v4", _INT8_KEYS, _K8V4_VALUES, "keys as int8, values in 4 bit, first 4 tokens in 16 bit", SINKS),
        _same("int8_plain", AffineCodec(8), "8 bit, asymmetric, nothing measured; as in LMDeploy"),
        _same("int4_plain", AffineCodec(4), "4 bit, asymmetric, nothing measured; breaks some models"),
        _same("int8_pertoken", SymmetricCodec(), "8 bit, symmetric, a scale for each token and head"),
        _static("int8_pertensor", StaticCodec(torch.int8), "8 bit, a measured scale for each layer"),
        _static(
            "int8_pertensor_perhead", StaticCodec(torch.int8, per_head=True), "8 bit, a measured scale for each head"
        ),
        _static("fp8_e4m3", StaticCodec(torch.float8_e4m3fn), "8-bit float, a measured scale for each layer"),
        _static("fp8_e5m2", StaticCodec(torch.float8_e5m2), "8-bit float of 2 bits mantissa, a measured scale"),
    )
}


_ALIASES = MappingProxyType(
    {
        "float32": "fp32",
        "bfloat16": "bf16",
        "float16": "fp16",
        "fp8": "fp8_e4m3",
        "int8_per_token_head": "int8_pertoken",
        "int4_per_token_head": "int4",
    }
)


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
class LayerPlan:
    """One layer's format and the constants that its codecs work with."""

    format: KVFormat
    key_stats: LayerStats = NO_STATS
    value_stats: LayerStats = NO_STATS

    def to(self, device: torch.device) -> LayerPlan:
        """The same with its constants on another device."""
        return LayerPlan(self.format, self.key_stats.to(device), self.value_stats.to(device))


@dataclass(frozen=True)
class KVPlan:
    """How each layer of a model keeps its KV; `name` is what a user calls it."""

    name: str
    layers: tuple[LayerPlan, ...]

    @classmethod
    def uniform(cls, fmt: KVFormat, num_layers: int) -> KVPlan:
        """The same format in every layer, without statistics."""
        return cls(fmt.name, (LayerPlan(fmt),) * num_layers)

    @property
    def lead(self) -> int:
        """Slots before a sequence's first token; all layers share it, since they share the block tables."""
        return max(layer.format.lead for layer in self.layers)

    def bytes_per_token(self, shape: KVShape) -> int:
        """Bytes one token takes in the whole model, metadata included."""
        one_layer = replace(shape, num_layers=1)
        return sum(layer.format.bytes_per_token(one_layer) for layer in self.layers)

    def bits_per_element(self, shape: KVShape, context: int = 4096) -> float:
        """Stored bits per key or value element in a text of `context` tokens, metadata and sinks included."""
        elements = 2 * shape.head_dim * shape.num_kv_heads * shape.num_layers * context
        return self.bytes_per_token(shape) * 8 * (context + self.lead) / elements


def check_finite(finite: Tensor) -> None:
    """Refuse to go on with tokens whose keys or values are not finite; finite [tokens] bool.

    Raises:
        NotFiniteError: there are some; it names them.
    """
    if not finite.all():
        raise NotFiniteError(
            "the model's keys or values are not finite: it overflows in this dtype, or its weights are damaged; "
            "try dtype='float32' or 'bfloat16'",
            (~finite).nonzero().flatten().tolist(),
        )


@dataclass(frozen=True)
class KVLayer:
    """One layer's share of the pool, as the kernels see it.

    `planes[name]` is [num_blocks, num_kv_heads, block_size, *plane.shape]: the tokens of a head lie together. `lead` is
    the plan's.
    """

    plan: LayerPlan
    block_size: int
    lead: int
    planes: Planes

    @property
    def format(self) -> KVFormat:
        """The layer's format."""
        return self.plan.format

    def side(self, prefix: str) -> Planes:
        """The planes of one codec ("key" or "value") under the codec's own names."""
        start = f"{prefix}."
        return {name.removeprefix(start): plane for name, plane in self.planes.items() if name.startswith(start)}

    def write(self, k: Tensor, v: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store tokens. k, v [kv_heads, tokens, head_dim], keys after RoPE; slots, positions [tokens] int64.

        Raises:
            NotFiniteError: a key or a value is not finite.
        """
        check_finite((k.isfinite() & v.isfinite()).all(-1).all(0))
        plan = self.plan
        sink = positions < plan.format.sinks
        for side, codec, x, stats in (
            ("key", plan.format.key, k, plan.key_stats),
            ("value", plan.format.value, v, plan.value_stats),
        ):
            planes = self.side(side)
            if not sink.all():
                codes = codec.encode(x[:, ~sink], positions[~sink], stats)
                self._put(planes, codes, slots[~sink])
            if sink.any():
                self._put_sinks(planes, x[:, sink], slots[sink], positions[sink])

    def _put(self, planes: Planes, codes: Planes, slots: Tensor) -> None:
        block, offset = slots // self.block_size, slots % self.block_size
        for name, plane in planes.items():
            plane[block, :, offset] = codes[name].transpose(0, 1)

    def _put_sinks(self, planes: Planes, x: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Spread each vector's float16 bytes over the codes of its `SINK_SPAN` slots."""
        codes = next(iter(planes.values())).view(torch.uint8)
        raw = FloatCodec(torch.float16).encode(x, positions, NO_STATS)["data"].view(torch.uint8)
        raw = F.pad(raw, (0, SINK_SPAN * codes.shape[-1] - raw.shape[-1]))
        first = slots - (positions + self.lead) + SINK_SPAN * positions
        spread = (first.unsqueeze(1) + torch.arange(SINK_SPAN, device=first.device)).flatten()
        self._put({"codes": codes}, {"codes": raw.unflatten(-1, (SINK_SPAN, -1)).flatten(1, 2)}, spread)

    def read(self, side: str, blocks: Tensor) -> Tensor:
        """The keys or values ("key", "value") in the blocks of one sequence, given in order.

        Returns:
            float32 [kv_heads, len(blocks) * block_size, head_dim]; entry m is token m, the last `lead` are zero. Slots
            that nobody wrote give anything, NaN included.
        """
        plan = self.plan
        codec, stats = (plan.format.key, plan.key_stats) if side == "key" else (plan.format.value, plan.value_stats)
        planes = {name: plane[blocks].transpose(0, 1).flatten(1, 2) for name, plane in self.side(side).items()}
        slots = len(blocks) * self.block_size
        skipped = self.lead + plan.format.sinks
        positions = torch.arange(plan.format.sinks, slots - self.lead, device=blocks.device)
        x = codec.decode({name: plane[:, skipped:] for name, plane in planes.items()}, positions, stats)
        if plan.format.sinks:
            x = torch.cat([self._sinks(next(iter(planes.values())), x.shape[-1]), x], dim=1)
        return F.pad(x, (0, 0, 0, self.lead))

    def _sinks(self, codes: Tensor, head_dim: int) -> Tensor:
        """The vectors whose float16 bytes the first slots hold; codes [kv_heads, slots, n]."""
        taken = codes.view(torch.uint8)[:, : SINK_SPAN * self.format.sinks].unflatten(1, (-1, SINK_SPAN)).flatten(2)
        halves: Tensor = taken[..., : 2 * head_dim].contiguous().view(torch.float16)
        return halves.float()
