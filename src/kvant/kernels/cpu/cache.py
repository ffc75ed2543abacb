"""A layer's KV cache and a step's tokens as the kernels see them: pointers to tensors, and what keeps these alive."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.formats.kv_codecs import (
    AffineCodec,
    FloatCodec,
    GroupedCodec,
    ShapedCodec,
    StaticCodec,
    SymmetricCodec,
    VectorCodec,
)
from kvant.formats.kv_stats import CENTRE_TILE, LayerStats, polynomials
from kvant.kernels.burst import Burst, Interrupt
from kvant.kernels.cpu import structs
from kvant.kernels.cpu.native import floats, pointer
from kvant.kernels.ops import AttentionBatch, AttentionShape, SamplingBatch

_MAX_HEAD_DIM = 256
_MAX_ORDER = 4  # terms of a centre
_MAX_GROUPS = 4  # of a vector's codes
_FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def kind_of(codec: VectorCodec) -> int | None:
    """The kernels' number for what a codec stores, or None where they have no loop for it."""
    match codec:
        case ShapedCodec(inner=inner):
            return kind_of(inner)
        case FloatCodec(dtype=dtype):
            return _FLOATS.get(dtype)
        case AffineCodec(bits=bits):
            return 3 if bits == 8 else 4
        case GroupedCodec(groups=groups) if groups <= _MAX_GROUPS:
            return 5
        case SymmetricCodec():
            return 6
        case StaticCodec(dtype=torch.int8):
            return 7
    return None


def is_native(layer: KVLayer, head_dim: int) -> bool:
    """Whether the kernels read and write this layer's format; their Hadamard matrices have blocks of 8 and more."""
    fits = head_dim % 8 == 0 and head_dim <= _MAX_HEAD_DIM
    centre = layer.plan.key_stats.centre
    fits = fits and (centre is None or centre.coefficients.shape[1] <= _MAX_ORDER)
    return fits and None not in (kind_of(layer.format.key), kind_of(layer.format.value))


@dataclass(frozen=True, eq=False)
class NativeCache:
    """The layers of a KV store, and the memory that the structures point to."""

    structs: object  # an array of structs.KvLayer
    memory: tuple[Tensor, ...]


def bind_cache(layers: Sequence[KVLayer]) -> NativeCache:
    """The structures of a store's layers, all of them native. They are good as long as the store lives."""
    memory: list[Tensor] = []
    turns: dict[bytes, tuple[Tensor, Tensor]] = {}
    found = [_layer(layer, memory, turns) for layer in layers]
    return NativeCache((structs.KvLayer * len(found))(*found), tuple(memory))


def _layer(layer: KVLayer, memory: list[Tensor], turns: dict[bytes, tuple[Tensor, Tensor]]) -> structs.KvLayer:
    plan = layer.plan
    struct = structs.KvLayer(
        key=_side(layer, "key", plan.format.key, plan.key_stats, memory),
        value=_side(layer, "value", plan.format.value, plan.value_stats, memory),
        sinks=plan.format.sinks,
        block_size=layer.block_size,
        lead=layer.lead,
    )
    centre = plan.key_stats.centre
    if centre is not None:
        key = centre.frequencies.numpy().tobytes()
        tokens = layer.block_size * next(iter(layer.planes.values())).shape[0]
        if key not in turns:
            turns[key] = _turns(centre.frequencies, tokens)
        cos, sin = turns[key]
        basis = polynomials(centre.coefficients.shape[1]).T.contiguous()
        memory += [cos, sin, basis]
        struct.turning = len(centre.frequencies)
        struct.turn_cos, struct.turn_sin, struct.basis = pointer(cos), pointer(sin), pointer(basis)
    return struct


def _turns(frequencies: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of each tile's middle, [tiles, pairs]; see `Centre`."""
    middles = torch.arange(tokens // CENTRE_TILE + 1) * CENTRE_TILE + (CENTRE_TILE - 1) / 2
    angles = middles.double().unsqueeze(1) * frequencies.double()
    return floats(angles.cos()), floats(angles.sin())


def _side(layer: KVLayer, side: str, codec: VectorCodec, stats: LayerStats, memory: list[Tensor]) -> structs.Side:
    kind = kind_of(codec)
    assert kind is not None, "the caller checks is_native"
    inner = codec.inner if isinstance(codec, ShapedCodec) else codec
    codes, *meta = layer.side(side).values()

    def kept(x: Tensor | None) -> int | None:
        if x is None:
            return None
        memory.append(floats(x))
        return pointer(memory[-1])

    centre = stats.centre if isinstance(codec, ShapedCodec) else None
    return structs.Side(
        kind=kind,
        groups=inner.groups if isinstance(inner, GroupedCodec) else 1,
        shaped=isinstance(codec, ShapedCodec),
        order=0 if centre is None else centre.coefficients.shape[1],
        codes=codes.data_ptr(),
        meta=meta[0].data_ptr() if meta else None,
        codes_stride=codes.stride(0) * codes.itemsize,
        meta_stride=meta[0].stride(0) * meta[0].itemsize if meta else 0,
        centre=None if centre is None else kept(centre.coefficients),
        balance=kept(stats.balance) if isinstance(codec, ShapedCodec) else None,
        feedback=None if stats.feedback is None else kept(_blockwise(stats.feedback)),
        scale=kept(stats.scale),
    )


def _blockwise(feedback: Tensor) -> Tensor:
    """Its rows in blocks of 8, from the block's first element on: before that they are 0; [kv_heads, ...]."""
    return torch.cat([feedback[:, i : i + 8, i:].flatten(1) for i in range(0, feedback.shape[-1], 8)], dim=1)


def bind_shape(shape: AttentionShape) -> structs.AttentionShape:
    """The structure of an attention layer's shape."""
    return structs.AttentionShape(
        heads=shape.num_heads,
        kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        window=shape.window or 0,
        scale=shape.scale,
        softcap=shape.softcap or 0.0,
    )


@dataclass(frozen=True, eq=False)
class NativeBatch:
    """A step's tokens, and the memory that the structure points to."""

    struct: structs.Batch
    memory: tuple[Tensor | array[int], ...]


def bind_batch(batch: AttentionBatch, ids: Tensor | None = None) -> NativeBatch:
    """The structure of a step's tokens; `ids` [T] int64, contiguous."""
    starts, lengths = array("q", batch.query_starts), array("q", batch.context_lens)
    positions, slots = batch.positions.contiguous(), batch.slots.contiguous()
    tables = batch.block_tables.contiguous()
    struct = structs.Batch(
        tokens=batch.query_starts[-1],
        sequences=len(lengths),
        table_width=tables.shape[1],
        ids=pointer(ids),
        positions=pointer(positions),
        slots=pointer(slots),
        query_starts=starts.buffer_info()[0],
        context_lens=lengths.buffer_info()[0],
        block_tables=pointer(tables),
    )
    memory = (positions, slots, starts, lengths, tables)
    return NativeBatch(struct, memory if ids is None else (*memory, ids))


@dataclass(frozen=True, eq=False)
class NativeSampling:
    """How rows are sampled, and the memory that the structure points to."""

    struct: structs.Sampling
    memory: tuple[Tensor, ...]


def bind_sampling(params: SamplingBatch) -> NativeSampling:
    """The structure of how rows are sampled."""
    numbers = (params.temperature, params.top_k, params.top_p, params.min_p, params.uniform)
    memory = tuple([x.contiguous() for x in numbers])
    return NativeSampling(structs.Sampling(*map(pointer, memory)), memory)


@dataclass(frozen=True, eq=False)
class NativeBurst:
    """When a burst ends and, after the call, how many steps it had; and the memory that the structure points to."""

    struct: structs.Burst
    memory: tuple[array[int], array[int], Interrupt]


def bind_burst(burst: Burst) -> NativeBurst:
    """The structure of when a burst ends."""
    stops = array("q", chain.from_iterable(burst.stops))
    starts = array("q", accumulate(map(len, burst.stops), initial=0))
    struct = structs.Burst(
        steps=burst.steps,
        stops=stops.buffer_info()[0],
        stop_starts=starts.buffer_info()[0],
        seconds=burst.seconds,
        interrupt=burst.interrupt.address,
    )
    return NativeBurst(struct, (stops, starts, burst.interrupt))
