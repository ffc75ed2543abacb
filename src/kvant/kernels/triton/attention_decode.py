"""Attention of single new tokens over the paged cache, whose codes are read once and never decoded to keys.

Programs share a context, each takes a part of it. What a codec does to keys is done to the query instead, and what it
does to values is undone on the sum of the parts.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kvant.formats.kv import SINK_SPAN, KVLayer
from kvant.formats.kv_stats import CENTRE_TILE
from kvant.kernels.ops import AttentionBatch, AttentionShape
from kvant.kernels.triton.attention_group import attend_group
from kvant.kernels.triton.attention_one import attend_one
from kvant.kernels.triton.attention_parts import LOG2E, merge
from kvant.kernels.triton.kv_layout import centre_arguments, dot_types, layer_key, side_arguments, side_of
from kvant.kernels.triton.launch import Config

ROWS = 16  # query heads that a program takes, and what tensor cores take at least
MULTIPROCESSORS = 132  # of an H100; an A100 has 108
MOST_SPLITS = 64
# What `merge` takes of a cache's sides.
_MERGED = ("k_codes", "v_codes", "v_balance", "K_KIND", "V_KIND", "V_HADAMARD", "K_CODE_STRIDE", "V_CODE_STRIDE")


def attention_decode(
    q: Tensor,
    cache: KVLayer,
    batch: AttentionBatch,
    shape: AttentionShape,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """Attention of the sequences that have one new token, as `Ops.attention`, into their rows of `out`, contiguous."""
    config = config or default(q, cache, batch, shape)
    keys, values = side_of(cache, "key"), side_of(cache, "value")
    q = q if q.stride(2) == 1 and q.stride(1) == shape.head_dim else q.contiguous()
    sequences, splits = len(batch.context_lens), config.blocks["SPLITS"]
    sums = torch.empty(sequences, shape.num_heads, splits, shape.head_dim, dtype=torch.float32, device=q.device)
    tops = torch.empty(sequences, shape.num_heads, splits, 2, dtype=torch.float32, device=q.device)
    softcap = shape.softcap or 0.0
    common = {
        "q": q, "sums": sums, "tops": tops, "starts": batch.starts, "lengths": batch.lengths,
        "tables": batch.block_tables, "scale": shape.scale if softcap else shape.scale * LOG2E,
        "q_stride": q.stride(0), "table_stride": batch.block_tables.stride(0), "SINKS": cache.format.sinks,
        "BLOCK_SIZE": cache.block_size, "HEADS": shape.num_heads, "KV_HEADS": shape.num_kv_heads,
        "DIM": shape.head_dim, "WINDOW": shape.window or 0, "SOFTCAP": softcap, "SPLITS": splits,
        "TILE": config.blocks["TILE"],
    }  # fmt: skip
    sides = side_arguments(keys, "k") | side_arguments(values, "v")
    launch = {**common, **sides, **centre_arguments(keys), "LEAD": cache.lead, "CENTRE_TILE": CENTRE_TILE}
    launch |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.blocks["DOT"]:
        k_type, v_type = dot_types(q.dtype, keys, values)
        pieces = shape.num_kv_heads * triton.cdiv(shape.num_heads // shape.num_kv_heads, ROWS)
        attend_group[(sequences, pieces, splits)](**launch, K_TYPE=k_type, V_TYPE=v_type, ROWS=ROWS)
    else:
        attend_one[(sequences, shape.num_heads, splits)](**launch, EXACT=q.dtype == torch.float32)
    merged = {name: sides[name] for name in _MERGED}
    merge[(sequences, shape.num_heads)](**common, **merged, out=out, SPAN=SINK_SPAN, num_warps=2)


def key(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> str:
    """What the best configuration depends on: the layer, and the sequences by powers of two.

    Not the context: a recorded step is launched for the longest that may come.
    """
    return f"s{triton.next_power_of_2(len(batch.context_lens))} {layer_key(q, cache, shape)}"


def default(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Config:
    """A good guess for data-center GPUs of compute capability 8.0 and 9.0."""
    return _config(cache, batch, shape, _dot_pays(cache, shape), 4, 4, 1)


def candidates(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> list[Config]:
    """What may be the fastest."""
    both = (True, False) if _can_do_without_dot(cache, shape) and shape.num_heads == shape.num_kv_heads else (True,)
    found = [
        _config(cache, batch, shape, dot, warps, waves, size)
        for dot in both
        for warps in (2, 4, 8)
        for waves in (2, 4, 8)
        for size in (1, 2)
    ]
    return [config for at, config in enumerate(found) if config not in found[:at]]


def _config(
    cache: KVLayer, batch: AttentionBatch, shape: AttentionShape, dot: bool, warps: int, waves: int, size: int
) -> Config:
    """Tiles of so many vectors that a thread has few elements, and parts for some programs a multiprocessor."""
    code_bytes = side_of(cache, "key").codes.element_size()
    elements = 32 * warps * (64 if code_bytes == 1 else 32) * size
    tile = min(max(elements // triton.next_power_of_2(shape.head_dim), 16), CENTRE_TILE)
    group = shape.num_heads // shape.num_kv_heads
    programs = len(batch.context_lens) * shape.num_kv_heads * (triton.cdiv(group, ROWS) if dot else group)
    splits = triton.next_power_of_2(max(1, waves * MULTIPROCESSORS // programs))
    most = triton.next_power_of_2(triton.cdiv(_context(batch, shape), tile))
    return Config({"TILE": tile, "SPLITS": min(splits, most, MOST_SPLITS), "DOT": int(dot)}, warps, 2)


def _dot_pays(cache: KVLayer, shape: AttentionShape) -> bool:
    return shape.num_heads > shape.num_kv_heads or not _can_do_without_dot(cache, shape)


def _can_do_without_dot(cache: KVLayer, shape: AttentionShape) -> bool:
    """Without tensor cores, groups of a vector must be a power of two of elements, as the vector is."""
    groups = max(side_of(cache, side).groups for side in ("key", "value"))
    return groups == 1 or shape.head_dim == triton.next_power_of_2(shape.head_dim)


def _context(batch: AttentionBatch, shape: AttentionShape) -> int:
    """The longest that is attended to."""
    return min(max(batch.context_lens), shape.window or max(batch.context_lens))
