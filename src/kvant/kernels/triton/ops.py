"""The ops on Triton's kernels. What has no kernel yet is computed by the reference, on the same device."""

from __future__ import annotations

from torch import Tensor

from kvant.kernels.reference import ReferenceOps
from kvant.kernels.triton import gated


class TritonOps(ReferenceOps):
    """`kernels.ops.Ops` on an NVIDIA GPU of compute capability 8.0 and later, or in Triton's interpreter."""

    name = "triton"

    def gated(self, x: Tensor, activation: str) -> Tensor:
        return gated.gated(x, activation)
