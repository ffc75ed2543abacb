"""Inputs of linear layers rounded to 8 bits, a scale a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvant.formats.weight import InputCodes
from kvant.kernels.triton.norm import Rounded
from kvant.kernels.triton.rounding import finite, rint


def input_codes(x: Tensor, inputs: InputCodes, columns: int) -> Rounded:
    """x [M, K] -> its codes [M, columns], zero from K on; `reference.rounded_inputs` says what they are."""
    codes = torch.empty(x.shape[0], columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch(x, inputs, codes, scale)
    return Rounded(codes, scale, x.dtype)


def rounded_inputs(x: Tensor, inputs: InputCodes) -> Tensor:
    """x [M, K] as its codes give it, in its dtype."""
    values = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, inputs, values, None)
    return values


def _launch(x: Tensor, inputs: InputCodes, out: Tensor, scale: Tensor | None) -> None:
    block = triton.next_power_of_2(out.shape[1])
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.shape[0]:
        _round[x.shape[:1]](
            x, inputs.scale, out, scale, x.shape[1], out.shape[1], x.stride(0),
            BLOCK=block, num_warps=min(max(block // 1024, 1), 16),
        )  # fmt: skip


@triton.jit
def _round(x, fixed, out, scales, k, columns, x_stride, BLOCK: tl.constexpr):
    """A program: a token. `fixed` is a scale for all, or None; `scales` None: out is of values."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + at, at < k, other=0.0).to(tl.float32)
    largest = tl.max(tl.where(finite(values), tl.abs(values), float("inf")), 0)
    scale = largest / 127 if fixed is None else tl.load(fixed).to(tl.float32)
    steps = tl.where(scale == 0, 0.0, 1 / scale)
    near = rint(tl.minimum(tl.maximum(values * steps, -127.0), 127.0))
    scale = tl.where(finite(largest), scale, float("nan"))
    if scales is None:
        near = (near * scale).to(out.dtype.element_ty)
    else:
        tl.store(scales + row, scale)
        near = near.to(tl.int8)
    tl.store(out + row * columns + at, near, at < columns)
