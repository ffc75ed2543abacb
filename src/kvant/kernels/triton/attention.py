"""Which kernels attend: those for single tokens, those for prompts and chunks of them, or each to its own rows."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.kernels.ops import AttentionBatch, AttentionShape
from kvant.kernels.triton import attention_decode, attention_prefill
from kvant.kernels.triton.tuning import Tuning


def attention(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape, tuning: Tuning) -> Tensor:
    """`kernels.ops.Ops.attention`."""
    counts = [stop - start for start, stop in pairwise(batch.query_starts)]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if max(counts) > 1:  # first: it leaves anything in the rows of single tokens
        config = tuning.pick(attention_prefill, q, cache, batch, shape)
        attention_prefill.attention_prefill(q, cache, batch, shape, out, fewest=2, config=config)
    if 1 in counts:
        config = tuning.pick(attention_decode, q, cache, batch, shape)
        attention_decode.attention_decode(q, cache, batch, shape, out, config=config)
    return out
