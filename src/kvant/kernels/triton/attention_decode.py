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
from kvant.kernels.triton.kv_layout import centre_arguments, dot_types, side_arguments, side_of
from kvant.kernels.triton.launch import Config

ROWS = 16  # query heads that a program takes, and what tensor cores take at least
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
    key, value = side_of(cache, "key"), side_of(cache, "value")
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
    sides = side_arguments(key, "k") | side_arguments(value, "v")
    launch = {**common, **sides, **centre_arguments(key), "LEAD": cache.lead, "CENTRE_TILE": CENTRE_TILE}
    launch |= {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if config.blocks["DOT"]:
        k_type, v_type = dot_types(q.dtype, key, value)
        pieces = shape.num_kv_heads * triton.cdiv(shape.num_heads // shape.num_kv_heads, ROWS)
        attend_group[(sequences, pieces, splits)](**launch, K_TYPE=k_type, V_TYPE=v_type, ROWS=ROWS)
    else:
        attend_one[(sequences, shape.num_heads, splits)](**launch, EXACT=q.dtype == torch.float32)
    merged = {name: sides[name] for name in _MERGED}
    merge[(sequences, shape.num_heads)](**common, **merged, out=out, SPAN=SINK_SPAN, num_warps=2)


def default(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Config:
    """What fits most shapes."""
    return Config(
        {"TILE": 32, "SPLITS": 2, "DOT": int(shape.num_heads > shape.num_kv_heads)}, num_warps=4, num_stages=1
    )
