"""The gated activation of an MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def gated(x: Tensor, activation: str) -> Tensor:
    """`Ops.gated`: x [T, 2 I], rows contiguous, activation "silu", "gelu_tanh" or "gelu" -> [T, I]."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        grid = (rows, triton.cdiv(width, BLOCK))
        _gated[grid](x, out, x.stride(0), width, ACTIVATION=activation, BLOCK=BLOCK, num_warps=4)
    return out


@triton.jit
def _gated(x, out, stride, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x + row * stride + at, inside, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + width + at, inside, other=0.0).to(tl.float32)
    result = _activated(gate, ACTIVATION) * up
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), inside)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(y)) / 2 is sigmoid(2 y)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
