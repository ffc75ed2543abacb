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
    """`Ops` whose linear layers take inputs of any float dtype and give float32.

    Attributes:
        dtype: that products are computed in, but for those of rounded inputs.
    """

    name = "chunked"

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.dtype = dtype

    def prepare(self, weight: PackedWeight) -> Any:
        prepared = super().prepare(weight)
        return prepared if isinstance(prepared, MatrixOnCodes) else prepared.to(self.dtype)

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        matrix = weight.values if isinstance(weight, MatrixOnCodes) else weight
        out = torch.empty(len(x), matrix.shape[0])
        for first in range(0, len(x), _ROWS_AT_ONCE):
            rows = x[first : first + _ROWS_AT_ONCE].to(matrix.dtype)
            if isinstance(weight, MatrixOnCodes):
                rows = rounded_inputs(rows, weight.inputs)
            out[first : first + _ROWS_AT_ONCE] = F.linear(rows, matrix)
        return out if bias is None else out.add_(bias)

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


def fast_dtype() -> torch.dtype:
    """bfloat16 where the CPU has instructions for its products, else float32.

    What a text does to statistics is as sure in the one as in the other; what is compared is computed in float32.
    """
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return torch.bfloat16 if known.get("avx512_bf16") or known.get("amx_bf16") else torch.float32


class UnpreparedOps(ChunkedOps):
    """The same for weights as they are read, a `PackedWeight` each: for layers that are still being changed."""

    def prepare(self, weight: PackedWeight) -> PackedWeight:
        return weight

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        return super().linear(x, super().prepare(weight), bias)
