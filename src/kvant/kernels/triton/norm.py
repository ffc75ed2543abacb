"""RMS norms: of rows, of single heads, of a residual's sum, and rounded to what a W8A8 linear layer takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvant.formats.weight import InputCodes
from kvant.kernels.triton.rounding import finite, rint


@dataclass(frozen=True)
class Rounded:
    """Rows as 8-bit codes: row t is codes[t] * scales[t].

    Attributes:
        codes: [T, K] int8, from -127 to 127.
        scales: [T] float32; NaN where a row is not finite.
        dtype: that the rows had, and that products with them have.
    """

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.codes)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`Ops.rms_norm`; the last dimension of x is contiguous, others may be strided."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, out, None, None)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`Ops.add_rms_norm` of x and residual [T, hidden]."""
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, residual, weight, eps, out, total, None)
    return out, total


def rounded_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, inputs: InputCodes
) -> tuple[Rounded, Tensor]:
    """add_rms_norm of x and residual [T, K], its first result as a linear layer with such inputs takes it.

    That is what `reference.rounded_inputs` rounds to.
    """
    rounded, total = _rounded_like(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, eps, rounded.codes, total, rounded.scales, inputs.scale)
    return rounded, total


def _rounded_like(x: Tensor) -> Rounded:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return Rounded(codes, torch.empty(len(x), dtype=torch.float32, device=x.device), x.dtype)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    total: Tensor | None,
    scales: Tensor | None,
    scale: Tensor | None = None,
) -> None:
    """out and total are contiguous; an argument that is None is neither read nor written."""
    if x.dim() not in (2, 3):
        x = x.reshape(-1, x.shape[-1])
    heads, width = x.shape[1] if x.dim() == 3 else 1, x.shape[-1]
    rows, block = x.shape[0] * heads, triton.next_power_of_2(width)
    if not rows:
        return
    tile = max(1024 // block, 1)
    _norm[(triton.cdiv(rows, tile),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        out if total is None else total,
        weight if scales is None else scales,
        weight if scale is None else scale,
        rows,
        x.stride(0),
        x.stride(1) if heads > 1 else 0,
        0 if residual is None else residual.stride(0),
        eps,
        HEADS=heads,
        WIDTH=width,
        ADD=residual is not None,
        CODES=scales is not None,
        MEASURED=scale is not None,
        TILE=tile,
        BLOCK=block,
        num_warps=min(max(tile * block // 512, 1), 16),
    )


@triton.jit(do_not_specialize=["rows"])
def _norm(
    x,
    residual,
    weight,
    out,
    total,
    scales,
    scale,
    rows,
    stride,
    head_stride,
    residual_stride,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    CODES: tl.constexpr,
    MEASURED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    at = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (at < WIDTH)[None, :]
    start = (row // HEADS) * stride + (row % HEADS) * head_stride
    values = tl.load(x + start[:, None] + at[None, :], inside, other=0.0)
    written = row[:, None] * WIDTH + at[None, :]
    if ADD:
        more = tl.load(residual + row[:, None] * residual_stride + at[None, :], inside, other=0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + written, values, inside)
    wide = values.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + eps)
    gains = tl.load(weight + at, at < WIDTH, other=0.0)
    normed = (wide * factor[:, None]) * gains[None, :]
    if CODES:
        # Codes of what the layer would be given otherwise: numbers of the compute dtype.
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
        largest = tl.max(tl.where(finite(normed), tl.abs(normed), float("inf")), axis=1)
        step = largest / 127 if not MEASURED else tl.load(scale) + tl.zeros_like(largest)
        factor = tl.where(step == 0, 0.0, 1 / step)
        codes = rint(tl.minimum(tl.maximum(normed * factor[:, None], -127.0), 127.0))
        tl.store(out + written, codes.to(tl.int8), inside)
        tl.store(scales + row, tl.where(finite(largest), step, float("nan")), row < rows)
    else:
        tl.store(out + written, normed.to(out.dtype.element_ty), inside)
