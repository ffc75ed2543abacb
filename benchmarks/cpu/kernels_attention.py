"""Attention on caches as the engine keeps them: decoding, one token over a long context, and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import byref
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from math import ceil

import torch
from kernel import Kernel, Planned

from kvant.cache.blocks import Paging
from kvant.cache.store import KVStore
from kvant.formats.kv import KV_FORMATS, KVPlan, KVShape
from kvant.formats.kv_codecs import FloatCodec, ShapedCodec
from kvant.formats.kv_stats import turn
from kvant.kernels.cpu.cache import bind_batch, bind_cache, bind_shape
from kvant.kernels.cpu.native import pointer
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.ops import AttentionBatch, AttentionShape
from kvant.models.spec import RopeSpec
from kvant.quantize.kv_constants import frequencies, key_shape, layer_plan
from kvant.quantize.kv_statistics import LayerStatistics

FORMATS = ("fp16", "int8", "int4")
SHAPES = ((64, 3), (64, 7), (64, 1), (128, 4))  # head_dim, query heads a KV head
KV_HEADS = 2
BLOCK = 64
CACHED = 2048  # tokens of one layer whose cache stays in the processor's
STREAMED = 96 << 20  # bytes of layers that are read one after the other, more than it holds
PROMPTS = ((256, 256), (512, 4608))  # new tokens, and the context with them
CALLS = 8  # of a single layer in a run: one call is too short to time
ROPE_THETA = 100_000.0


@dataclass(frozen=True, eq=False)
class Scene:
    """Layers of one cache and a step's tokens, with what their structures point to."""

    ops: CpuOps
    store: KVStore
    batch: AttentionBatch
    shape: AttentionShape

    def kernel(self) -> Kernel:
        """A run is the next layer's turn, or several where one that decodes is alone.

        Units are the tokens that each new token attends to, times KV heads.
        """
        new, context = len(self.batch.positions), self.batch.context_lens[0]
        q = torch.randn(new, self.shape.num_heads, self.shape.head_dim)
        out, layers, tokens = torch.empty_like(q), bind_cache(self.store.layers), bind_batch(self.batch)
        shape, structs, turns = bind_shape(self.shape), layers.structs, cycle(range(len(self.store.layers)))
        calls = CALLS if len(self.store.layers) == new == 1 else 1

        def run() -> None:
            kept = layers, tokens  # their memory, which the structures point to
            for layer in islice(turns, calls):
                self.ops.native.call(
                    "attention", byref(structs[layer]), byref(shape), byref(tokens.struct), pointer(q), pointer(out)
                )
            assert kept

        units = calls * KV_HEADS * (new * context - new * (new - 1) // 2)
        vector = sum(plane.bytes for plane in self.store.layers[0].format.planes(self.shape.head_dim))
        products = 2 * self.shape.head_dim * self.shape.num_heads // KV_HEADS
        integer = self.store.layers[0].format.name.startswith("int")
        read = calls * KV_HEADS * context * vector
        return Kernel(run, units, read, units * 2 * products, "dot" if integer else "fma")


def kernels(ops: CpuOps) -> Iterator[Planned]:
    """Each format and shape: decodes from the processor's caches and from memory, then prompts."""
    for head_dim, ratio in SHAPES:
        for fmt in FORMATS:
            name = f"attention {fmt} d{head_dim} gqa{ratio}"
            yield f"{name} cached", partial(_kernel, ops, fmt, head_dim, ratio, CACHED, 1)
            yield f"{name} streamed", partial(_kernel, ops, fmt, head_dim, ratio, 4 * CACHED, 0)
    for head_dim, ratio in SHAPES:
        for fmt in FORMATS:
            for new, context in PROMPTS:
                name = f"attention {fmt} d{head_dim} gqa{ratio} prompt {new} of {context}"
                yield name, partial(_kernel, ops, fmt, head_dim, ratio, context, 1, new)


def _kernel(ops: CpuOps, fmt: str, head_dim: int, ratio: int, context: int, layers: int, new: int = 1) -> Kernel:
    return make_scene(ops, fmt, head_dim, ratio, context, layers, new).kernel()


def make_scene(ops: CpuOps, name: str, head_dim: int, ratio: int, context: int, layers: int, new: int = 1) -> Scene:
    """A sequence whose last `new` tokens are computed; with 0 layers, as many as take `STREAMED` bytes."""
    fmt, rope = KV_FORMATS[name], RopeSpec(dim=head_dim, theta=ROPE_THETA)
    shape = KVShape(1, KV_HEADS, head_dim)
    layers = layers or ceil(STREAMED / (context * fmt.bytes_per_token(shape)))
    plan = KVPlan(name, (layer_plan(fmt, statistics(KV_HEADS, head_dim, rope), rope),) * layers)
    paging = Paging(BLOCK, plan.lead)
    count = paging.blocks_for(context)
    store = KVStore.allocate(KVShape(layers, KV_HEADS, head_dim), plan, count, BLOCK)
    table, positions = torch.randperm(count).unsqueeze(0), torch.arange(context)
    numbers = positions + plan.lead
    slots = table[0, numbers // BLOCK] * BLOCK + numbers % BLOCK
    k, v = torch.randn(2, context, KV_HEADS, head_dim)
    filling = AttentionBatch(positions, slots, (0, context), (context,), table)
    ops.rope_write_kv(k, k, v, None, store.layers[0], filling)
    for layer in store.layers[1:]:
        for plane, first in zip(layer.planes.values(), store.layers[0].planes.values(), strict=True):
            plane.copy_(first)
    batch = AttentionBatch(positions[-new:], slots[-new:], (0, new), (context,), table)
    return Scene(ops, store, batch, AttentionShape(KV_HEADS * ratio, KV_HEADS, head_dim, head_dim**-0.5))


def statistics(kv_heads: int, head_dim: int, rope: RopeSpec) -> LayerStatistics:
    """Of made-up keys with a mean, and of queries that lie in few directions."""
    mean, spread = torch.randn(kv_heads, head_dim), torch.randn(kv_heads, head_dim).mul(0.6).exp()
    directions = torch.randn(kv_heads, head_dim, head_dim) * torch.randn(kv_heads, 1, head_dim).exp()
    moments = mean, spread.square(), directions @ directions.mT / head_dim
    positions = torch.arange(BLOCK)
    keys = turn(mean.unsqueeze(1) + torch.randn(kv_heads, BLOCK, head_dim), positions, frequencies(rope))
    shaped = ShapedCodec(FloatCodec(torch.float32)).shaped(keys, positions, key_shape(*moments, rope))
    ranges = keys.abs().amax((1, 2)), shaped.abs().amax((1, 2))
    return LayerStatistics(*moments, key_range=ranges[0], value_range=ranges[0], shaped_key_range=ranges[1])
