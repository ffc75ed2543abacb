"""The ops on Triton's kernels. What has no kernel is computed by the reference, on the same device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.formats.weight import PackedWeight
from kvant.kernels.ops import AttentionBatch, AttentionShape, SamplingBatch
from kvant.kernels.reference import CPU, ReferenceOps
from kvant.kernels.triton import attention, embedding, gated, kv_write, linear, norm, sample, weights
from kvant.kernels.triton.tuning import Tuning


class TritonOps(ReferenceOps):
    """`kernels.ops.Ops` on an NVIDIA GPU of compute capability 8.0 and later, or in Triton's interpreter."""

    name = "triton"
    capturable = True
    packed_weights = True

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__(device)
        self._tuning = Tuning.of(torch.cuda.get_device_name(device)) if device.type == "cuda" else Tuning()

    def prepare(self, weight: PackedWeight) -> Any:
        return weights.prepare(weight, self.device)

    def linear(self, x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
        return linear.linear(x, weight, bias, self._tuning)

    def embedding(self, ids: Tensor, weight: Any) -> Tensor:
        return embedding.embedding(ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, reader: Any = None
    ) -> tuple[Any, Tensor]:
        if linear.takes_codes(reader):
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

    def attention(self, q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Tensor:
        return attention.attention(q, cache, batch, shape, self._tuning)

    def gated(self, x: Tensor, activation: str) -> Tensor:
        return gated.gated(x, activation)

    def sample(self, logits: Tensor, params: SamplingBatch) -> Tensor:
        if params.greedy:
            return sample.greedy(logits)
        return sample.sample(logits, params.to(logits.device))
