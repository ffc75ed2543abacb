"""Writing keys and values into caches as the engine keeps them: the tokens of a prefill, and one token of a decode."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import byref
from functools import partial

import torch
from kernel import Kernel, Planned
from kernels_attention import BLOCK, ROPE_THETA, statistics

from kvant.cache.blocks import Paging
from kvant.cache.store import KVStore
from kvant.formats.kv import KV_FORMATS, KVPlan, KVShape
from kvant.kernels.cpu.cache import bind_batch, bind_cache, bind_shape
from kvant.kernels.cpu.native import pointer
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.ops import AttentionBatch, AttentionShape
from kvant.models.spec import RopeSpec
from kvant.quantize.kv_constants import layer_plan

FORMATS = ("fp16", "int8", "int4")
SHAPES = ((64, 3), (64, 32), (128, 8))  # head_dim, KV heads: a call's own cost is little beside 32 heads
STEPS = (("prefill", 256, 1), ("decode", 1, 30))  # tokens, and layers that have their turn in a run


def kernels(ops: CpuOps) -> Iterator[Planned]:
    """Each format and shape; units are vectors, a key or value of a token and KV head."""
    for head_dim, heads in SHAPES:
        for fmt in FORMATS:
            for name, tokens, layers in STEPS:
                sizes = layers, heads, head_dim
                yield f"write {fmt} d{head_dim} kv{heads} {name}", partial(_kernel, ops, fmt, sizes, tokens)


def _kernel(ops: CpuOps, fmt: str, sizes: tuple[int, int, int], tokens: int) -> Kernel:
    """Bytes are those that are stored; of the floats that are read, and of the constants, nothing is said."""
    layers, heads, head_dim = sizes
    rope, start = RopeSpec(dim=head_dim, theta=ROPE_THETA), BLOCK // 2
    plans = [layer_plan(KV_FORMATS[fmt], statistics(heads, head_dim, rope), rope) for _ in range(layers)]
    plan = KVPlan(fmt, tuple(plans))
    paging = Paging(BLOCK, plan.lead)
    count = paging.blocks_for(start + tokens)
    store = KVStore.allocate(KVShape(layers, heads, head_dim), plan, count, BLOCK)
    positions = torch.arange(start, start + tokens)
    batch = AttentionBatch(
        positions, positions + plan.lead, (0, tokens), (start + tokens,), torch.arange(count).unsqueeze(0)
    )
    cache, step, shape = bind_cache(store.layers), bind_batch(batch), AttentionShape(heads, heads, head_dim, 1.0)
    k, v = torch.randn(2, tokens, heads, head_dim)
    bad, bound, structs = torch.zeros(tokens, dtype=torch.uint8), bind_shape(shape), cache.structs

    def run() -> None:
        kept = store, cache, step  # their memory, which the structures point to
        for layer in range(layers):
            ops.native.call(
                "write_kv",
                byref(structs[layer]),
                byref(bound),
                byref(step.struct),
                pointer(k),
                pointer(v),
                pointer(bad),
            )
        assert kept

    vectors = 2 * layers * heads * tokens
    stored = layers * tokens * KV_FORMATS[fmt].bytes_per_token(KVShape(1, heads, head_dim))
    return Kernel(run, vectors, int(stored), 0, "fma")
