"""The ops for many texts at once: the reference's mathematics, in float32 and in pieces that fit in memory.

Unlike the reference's, a token's results may depend on what else is computed with it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.formats.weight import PackedWeight
from kvant.kernels.ops import AttentionBatch, AttentionShape
from kvant.kernels.reference import MatrixOnCodes, ReferenceOps, rounded_inputs

_ROWS_AT_ONCE = 1024


class ChunkedOps(ReferenceOps):
    """`Ops` whose products take inputs of any float dtype and are float32."""

    name = "chunked"

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        matrix = weight.values if isinstance(weight, MatrixOnCodes) else weight
        out = torch.empty(len(x), matrix.shape[0])
        for first in range(0, len(x), _ROWS_AT_ONCE):
            rows = x[first : first + _ROWS_AT_ONCE].float()
            if isinstance(weight, MatrixOnCodes):
                rows = rounded_inputs(rows, weight.inputs)
            out[first : first + _ROWS_AT_ONCE] = F.linear(rows, matrix, bias)
        return out

    def attention(self, q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Tensor:
        longest = max(batch.context_lens)
        if shape.softcap is not None or (shape.window is not None and shape.window < longest):
            return super().attention(q, cache, batch, shape)
        out = torch.empty_like(q)
        for sequence, (start, stop) in enumerate(pairwise(batch.query_starts)):
            keys, values = (cache.read(side, batch.block_tables[sequence]) for side in ("key", "value"))
            count = stop - start
            assert count == batch.context_lens[sequence], "only whole texts are read here"
            mixed = F.scaled_dot_product_attention(
                q[start:stop].transpose(0, 1).unsqueeze(0),
                keys[:, :count].unsqueeze(0),
                values[:, :count].unsqueeze(0),
                is_causal=True,
                scale=shape.scale,
                enable_gqa=True,
            )
            out[start:stop] = mixed[0].transpose(0, 1)
        return out


class UnpreparedOps(ChunkedOps):
    """The same for weights as they are read, a `PackedWeight` each: for layers that are still being changed."""

    def prepare(self, weight: PackedWeight) -> PackedWeight:
        return weight

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return super().linear(x, super().prepare(weight), bias)
