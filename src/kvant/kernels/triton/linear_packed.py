"""Products with matrices of few bits, whose codes become floats in registers.

The matrix is the left operand, x^T the right one. So few tokens fill tensor cores, whose right operand may be narrow,
and what is unpacked is multiplied from registers, without a way through shared memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvant.kernels.triton.embedding import expanded
from kvant.kernels.triton.launch import Config, interpreted
from kvant.kernels.triton.span_codes import codes_less, per_group, zero_points
from kvant.kernels.triton.sums import finish, leave
from kvant.kernels.triton.weights import WORDS, SpanCodes

# Tokens from which a matrix that is expanded to 16 bits first is multiplied faster, by cuBLAS.
_MANY = 512
_MANY_IN_FLOAT32 = 16  # there tensor cores are of no use
_PROGRAMS = 396  # three on each multiprocessor of an H100 or H200, as registers allow: it hides the latency of memory
EXPAND = Config({"EXPAND": 1})


def key(m: int, weight: SpanCodes, dtype: torch.dtype) -> str:
    """What the best configuration depends on: "m16 n4096 k4096 int4 g128 zero float16"; m is the next power of two."""
    (n, k), rows = weight.shape, max(16, triton.next_power_of_2(m))
    kind = "bias" if weight.bias is not None else "symmetric" if weight.zero is None else "zero"
    return f"m{rows} n{n} k{k} int{weight.bits} g{min(weight.group, k)} {kind} {str(dtype).removeprefix('torch.')}"


def default(m: int, weight: SpanCodes, dtype: torch.dtype) -> Config:
    """A good configuration for any card."""
    if m > (_MANY_IN_FLOAT32 if dtype == torch.float32 else _MANY):
        return EXPAND
    tokens = min(max(16, triton.next_power_of_2(m)), 128)
    rows = 64 if weight.shape[0] <= 64 or tokens == 64 else 128
    return _config(m, weight, rows, tokens, 128, warps=4, stages=4 if tokens <= 32 else 3)


def candidates(m: int, weight: SpanCodes, dtype: torch.dtype) -> list[Config]:
    """What is worth a measurement."""
    found = [default(m, weight, dtype)]
    if m > 64:
        found.append(EXPAND)
    for rows in (64, 128) if m <= 256 else (128,):
        for tokens in {min(max(16, triton.next_power_of_2(m)), limit) for limit in (64, 128, 256)}:
            for depth in (64, 128, 256) if tokens <= 64 else (64, 128):
                for stages in (3, 5) if tokens <= 64 else (3, 4):
                    warps = 8 if rows * tokens > 128 * 64 else 4
                    found.append(_config(m, weight, rows, tokens, depth, warps, stages))
    if m <= 16:
        found += [
            _config(m, weight, rows, 16, 128, 4, stages, few)
            for rows in (64, 128)
            for stages in (3, 5)
            for few in (264, 528, 1056)
        ]
    return [config for at, config in enumerate(found) if config not in found[:at]]


def _config(
    m: int, weight: SpanCodes, rows: int, tokens: int, depth: int, warps: int, stages: int, programs: int = _PROGRAMS
) -> Config:
    """A product of so many rows and tokens a program, `depth` columns at a time, K split for so many programs."""
    step = max(1, depth // weight.span)
    steps = triton.cdiv(triton.cdiv(weight.shape[1], weight.span), step)
    split = min(16, max(1, steps // 4), max(1, programs // triton.cdiv(weight.shape[0], rows))) if m <= tokens else 1
    # Scaling sums over a group costs less than scaling weights where the sums are few.
    fold = int(tokens <= 32 and weight.bias is None)
    return Config({"ROWS": rows, "TOKENS": tokens, "STEP": step, "SPLIT": split, "FOLD": fold}, warps, stages)


def linear_packed(x: Tensor, weight: SpanCodes, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """`Ops.linear`: x [M, K] float16, bfloat16 or float32 -> [M, N] in its dtype, the same bits each time."""
    x = _in_order(x, weight)
    config = config or default(x.shape[0], weight, x.dtype)
    if "EXPAND" in config.blocks:
        return F.linear(x, expanded(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if x.shape[0]:
        _launch(x, weight, bias, out, config)
    return out


def _in_order(x: Tensor, weight: SpanCodes) -> Tensor:
    if weight.order is not None:
        return x.index_select(1, weight.order)
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(x: Tensor, weight: SpanCodes, bias: Tensor | None, out: Tensor, config: Config) -> None:
    (m, k), n, blocks = x.shape, weight.shape[0], config.blocks
    tokens, split = triton.cdiv(m, blocks["TOKENS"]), blocks["SPLIT"]
    if split > 1 and tokens > 1:
        raise ValueError(f"a sum is split for {m} tokens, more than the {blocks['TOKENS']} of one program")
    parts = torch.empty(split, m, n, dtype=torch.float32, device=x.device) if split > 1 else None
    _linear[(tokens, triton.cdiv(n, blocks["ROWS"]), split)](
        x, weight.words, weight.scale, weight.zero, weight.bias, bias, out, parts, weight.arrivals,
        m, n, k, x.stride(0), weight.scale.shape[0],
        BITS=weight.bits, GROUP=weight.group, WORDS=WORDS, ASSEMBLY=x.dtype != torch.float32 and not interpreted(),
        EVEN=k % (weight.span * blocks["STEP"]) == 0, **config.options,
    )  # fmt: skip


@triton.jit
def _linear(
    x, words, scales, zeros, biases, bias, out, parts, arrivals, m, n, k, x_stride, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, ASSEMBLY: tl.constexpr,
    EVEN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """A program: ROWS outputs of TOKENS tokens, over one of SPLIT parts of K; STEP spans at a time.

    zeros, biases, bias and parts may be None.
    """
    SPAN: tl.constexpr = WORDS * (16 // BITS)
    PIECE: tl.constexpr = min(STEP, max(1, GROUP // SPAN))  # spans that share a scale
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row, part = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2)
    steps = tl.cdiv(tl.cdiv(k, SPAN), STEP)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range(steps * part // SPLIT, steps * (part + 1) // SPLIT):
        for piece in tl.static_range(STEP // PIECE):
            total = _add_piece(
                total, step * STEP + piece * PIECE, x, words, scales, zeros, biases, row, token, m, n, k, x_stride,
                groups, BITS, GROUP, WORDS, ASSEMBLY, EVEN, PIECE, FOLD,
            )  # fmt: skip
    if SPLIT > 1:
        leave(total, parts, arrivals, bias, out, row, token, m, n, SPLIT)
    else:
        finish(total, bias, out, row, token, m, n)


@triton.jit
def _add_piece(
    total, span, x, words, scales, zeros, biases, row, token, m, n, k, x_stride, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, ASSEMBLY: tl.constexpr,
    EVEN: tl.constexpr, PIECE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """total + W x^T over PIECE spans from `span` on."""
    PLACES: tl.constexpr = 16 // BITS
    ALIKE: tl.constexpr = min(PLACES, GROUP // WORDS)  # places that share a scale
    TYPE: tl.constexpr = x.dtype.element_ty
    inside, j = row < n, tl.arange(0, PIECE * WORDS)
    at = (span + j // WORDS).to(tl.int64)[None, :] * (n * WORDS) + row[:, None] * WORDS + (j % WORDS)[None, :]
    codes = tl.load(words + at, inside[:, None], other=0)
    column = (span + j // WORDS) * (WORDS * PLACES) + j % WORDS
    some = tl.zeros_like(total)
    for place in tl.static_range(PLACES):
        at_x = x + token.to(tl.int64)[None, :] * x_stride + (column + place * WORDS)[:, None]
        held = (token < m)[None, :]
        if not EVEN:
            held = held & (column + place * WORDS < k)[:, None]
        inputs = tl.load(at_x, held, other=0.0)
        if place % ALIKE == 0:
            group = (span * PLACES + place) * WORDS // GROUP
            scale = per_group(scales, group, groups, n, row, inside)
            zero = zero_points(zeros, scale, group, groups, n, row, inside, BITS)
        value = codes_less(codes, zero, place, TYPE, BITS, ASSEMBLY)
        if FOLD:
            if place % ALIKE == 0:
                some = tl.dot(value, inputs, input_precision="ieee")
            else:
                some = tl.dot(value, inputs, some, input_precision="ieee")
            if place % ALIKE == ALIKE - 1:
                total += some * scale[:, None]
        else:
            wide = value.to(tl.float32) * scale[:, None]
            if biases is not None:
                wide += (per_group(biases, group, groups, n, row, inside) + zero * scale)[:, None]
            total = tl.dot(wide.to(TYPE), inputs, total, input_precision="ieee")
    return total
