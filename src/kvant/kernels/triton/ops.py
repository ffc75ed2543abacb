"""The ops on Triton's kernels. What has no kernel yet is computed by the reference, on the same device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.formats.weight import PackedWeight
from kvant.kernels.ops import AttentionBatch, SamplingBatch
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.triton import embedding, gated, kv_write, linear, norm, sample, weights


class TritonOps(ReferenceOps):
    """`kernels.ops.Ops` on an NVIDIA GPU of compute capability 8.0 and later, or in Triton's interpreter."""

    name = "triton"
    capturable = True
    packed_weights = True

    def prepare(self, weight: PackedWeight) -> Any:
        return weights.prepare(weight, self.device)

    def linear(self, x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
        return linear.linear(x, weight, bias)

    def embedding(self, ids: Tensor, weight: Any) -> Tensor:
        return embedding.embedding(ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, reader: Any = None
    ) -> tuple[Any, Tensor]:
        if isinstance(reader, weights.RowCodes) and reader.order is None:
            return norm.rounded_add_rms_norm(x, residual, weight, eps, reader.inputs)
        return norm.add_rms_norm(x, residual, weight, eps)

    def rope_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVLayer,
        batch: AttentionBatch,
    ) -> Tensor:
        return kv_write.rope_write_kv(q, k, v, rotary, cache, batch)

    def gated(self, x: Tensor, activation: str) -> Tensor:
        return gated.gated(x, activation)

    def sample(self, logits: Tensor, params: SamplingBatch) -> Tensor:
        if params.greedy:
            return sample.greedy(logits)
        return sample.sample(logits, params.to(logits.device))
