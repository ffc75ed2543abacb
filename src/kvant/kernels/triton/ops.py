"""The ops on Triton's kernels. What has no kernel yet is computed by the reference, on the same device."""

from __future__ import annotations

from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.kernels.ops import AttentionBatch, AttentionShape
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.triton import attention, gated, norm


class TritonOps(ReferenceOps):
    """`kernels.ops.Ops` on an NVIDIA GPU of compute capability 8.0 and later, or in Triton's interpreter."""

    name = "triton"

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return norm.add_rms_norm(x, residual, weight, eps)

    def attention(self, q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Tensor:
        return attention.attention(q, cache, batch, shape)

    def gated(self, x: Tensor, activation: str) -> Tensor:
        return gated.gated(x, activation)
