"""Products of 8-bit inputs with 8-bit weights, a scale a token and a scale a row: sums are of integers, so exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvant.kernels.triton.input_codes import input_codes
from kvant.kernels.triton.launch import Config
from kvant.kernels.triton.norm import Rounded
from kvant.kernels.triton.sums import finish, leave, room_for_parts, split_for
from kvant.kernels.triton.weights import RowCodes

_PROGRAMS = 528  # four on each multiprocessor of an H100 or H200, where there is room


def key(m: int, weight: RowCodes) -> str:
    """What the best configuration depends on: "m16 n4096 k4096"; m is the next power of two."""
    n, k = weight.shape
    return f"m{max(16, triton.next_power_of_2(m))} n{n} k{k}"


def default(m: int, weight: RowCodes) -> Config:
    """A good configuration for any card."""
    tokens = min(max(16, triton.next_power_of_2(m)), 128)
    return _config(m, weight, 64 if tokens <= 64 else 128, tokens, 128, 4 if tokens <= 64 else 8, 4)


def candidates(m: int, weight: RowCodes) -> list[Config]:
    """What is worth a measurement."""
    found = [default(m, weight)]
    for rows in (64, 128):
        for tokens in {min(max(16, triton.next_power_of_2(m)), limit) for limit in (64, 128, 256)}:
            for depth in (64, 128):
                for stages in (3, 5) if tokens <= 64 else (3, 4):
                    warps = 8 if rows * tokens > 128 * 64 else 4
                    found.append(_config(m, weight, rows, tokens, depth, warps, stages))
    return [config for at, config in enumerate(found) if config not in found[:at]]


def _config(m: int, weight: RowCodes, rows: int, tokens: int, depth: int, warps: int, stages: int) -> Config:
    steps = weight.codes.shape[1] // depth
    blocks = triton.cdiv(m, tokens) * triton.cdiv(weight.shape[0], rows)
    split = split_for(steps, blocks, _PROGRAMS if tokens <= 64 else _PROGRAMS // 4)
    return Config({"ROWS": rows, "TOKENS": tokens, "DEPTH": depth, "SPLIT": split}, warps, stages)


def linear_int8(
    x: Tensor | Rounded, weight: RowCodes, bias: Tensor | None = None, config: Config | None = None
) -> Tensor:
    """`Ops.linear`: x [M, K] is rounded to 8 bits, a scale a token, if it is not yet -> [M, N] in its dtype."""
    if isinstance(x, Rounded):
        return product(x, weight, bias, config)
    if weight.order is not None:
        x = x.index_select(1, weight.order)
    return product(input_codes(x, weight.inputs, weight.codes.shape[1]), weight, bias, config)


def product(x: Rounded, weight: RowCodes, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """x W^T + bias, [M, N]: of inputs [M, K] that are codes already, ordered as the weight's columns."""
    (m, _), (n, depth) = x.codes.shape, weight.codes.shape
    out = torch.empty(m, n, dtype=x.dtype, device=x.codes.device)
    if m == 0:
        return out
    codes = F.pad(x.codes, (0, depth - x.codes.shape[1])) if x.codes.shape[1] < depth else x.codes
    config = config or default(m, weight)
    blocks = config.blocks
    grid = (triton.cdiv(m, blocks["TOKENS"]), triton.cdiv(n, blocks["ROWS"]), blocks["SPLIT"])
    parts = room_for_parts(blocks["SPLIT"], out, grid[0] * grid[1], weight.arrivals)
    _linear[grid](
        codes, x.scales, weight.codes, weight.scale, bias, out, parts, weight.arrivals, m, n, depth, **config.options
    )
    return out


@triton.jit(do_not_specialize=["m"])
def _linear(
    x, x_scale, codes, scale, bias, out, parts, arrivals, m, n, k,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """A program: ROWS outputs of TOKENS tokens, over one of SPLIT parts of K. bias and parts may be None."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row, part = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2)
    inside, asked = row < n, token < m
    at, steps = tl.arange(0, DEPTH), k // DEPTH
    first, last = steps * part // SPLIT, steps * (part + 1) // SPLIT
    left = codes + row.to(tl.int64)[:, None] * k + (first * DEPTH + at)[None, :]
    right = x + token.to(tl.int64)[None, :] * k + (first * DEPTH + at)[:, None]
    total = tl.zeros([ROWS, TOKENS], tl.int32)
    for _ in range(first, last):
        weights = tl.load(left, inside[:, None], other=0)
        inputs = tl.load(right, asked[None, :], other=0)
        total = tl.dot(weights, inputs, total, out_dtype=tl.int32)
        left += DEPTH
        right += DEPTH
    by_row = tl.load(scale + row, inside, other=0.0)[:, None]
    values = total.to(tl.float32) * by_row * tl.load(x_scale + token, asked, other=0.0)[None, :]
    if SPLIT > 1:
        leave(values, parts, arrivals, bias, out, row, token, m, n, SPLIT)
    else:
        finish(values, bias, out, row, token, m, n)
