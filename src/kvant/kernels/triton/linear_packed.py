"""Products with matrices of few bits, whose codes become floats in registers.

The matrix is the left operand, x^T the right one. So few tokens fill tensor cores, whose right operand may be narrow,
and what is unpacked is multiplied from registers, without a way through shared memory.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvant.kernels.triton.embedding import expanded
from kvant.kernels.triton.launch import Config, interpreted
from kvant.kernels.triton.span_codes import codes_less, of_group
from kvant.kernels.triton.sums import finish, leave, room_for_parts, split_for
from kvant.kernels.triton.weights import SPANS, WORDS, SpanCodes

# Tokens from which a matrix that is expanded to 16 bits first is multiplied faster, by cuBLAS.
_MANY = 512
_MANY_IN_FLOAT32 = 16  # there tensor cores are of no use
_MULTIPROCESSORS = 132
EXPAND = Config({"EXPAND": 1})


def key(m: int, weight: SpanCodes, dtype: torch.dtype) -> str:
    """What the best configuration depends on: "m8 n4096 k4096 int4 g128 zero float16".

    m is 1, or the next power of two from 8 on.
    """
    (n, k), group, name = weight.shape, min(weight.group, weight.shape[1]), str(dtype).removeprefix("torch.")
    kind = "bias" if weight.bias is not None else "symmetric" if weight.zero is None else "zero"
    return f"m{_tokens(m) if m > 1 else 1} n{n} k{k} int{weight.bits} g{group} {kind} {name}"


def default(m: int, weight: SpanCodes, dtype: torch.dtype) -> Config:
    """A good configuration for any card."""
    if m > (_MANY_IN_FLOAT32 if dtype == torch.float32 else _MANY):
        return EXPAND
    tokens = min(_tokens(m), 128)
    if tokens <= 32:
        # Two warps: on Hopper, too, tensor cores are then asked in the old way, that waits for less.
        return _config(m, weight, 64, tokens, 128, 2, 4)
    return _config(m, weight, 64, 64, 128, 4, 3) if tokens == 64 else _config(m, weight, 128, 128, 128, 8, 3)


def candidates(m: int, weight: SpanCodes, dtype: torch.dtype) -> list[Config]:
    """What is worth a measurement."""
    found, tokens = [default(m, weight, dtype)], _tokens(m)
    if tokens <= 64:
        tiles, loops = [(64, 2), (64, 4), (128, 8 if tokens == 64 else 4)], [(128, 3), (128, 5), (256, 3)]
        found += [
            _config(m, weight, rows, tokens, depth, warps, stages, each)
            for (rows, warps), (depth, stages), each in product(tiles, loops, (3, 8))
        ]
    else:
        larger = [(64, 64, 128, 4, 3), (128, 64, 128, 8, 3), (64, 128, 128, 4, 3), (128, 128, 128, 8, 3)]
        larger += [(128, 128, 64, 8, 4), (128, 256, 64, 8, 3)]
        found += [EXPAND, *(_config(m, weight, *tile, each) for tile, each in product(larger, (1, 2)))]
        found += [replace(one, blocks={**one.blocks, "FOLD": 0}) for one in found if one.blocks.get("FOLD")]
    return [config for at, config in enumerate(found) if config not in found[:at]]


def _tokens(m: int) -> int:
    return int(max(8, triton.next_power_of_2(m)))  # tensor cores take no fewer


def _config(
    m: int, weight: SpanCodes, rows: int, tokens: int, depth: int, warps: int, stages: int, each: int | None = None
) -> Config:
    """A program computes so many rows of so many tokens, `depth` columns at a time.

    Sums are cut for `each` programs on a multiprocessor; None is as many as have room there.
    """
    step = min(SPANS, depth // weight.span)
    steps = triton.cdiv(triton.cdiv(weight.shape[1], weight.span), step)
    blocks = triton.cdiv(m, tokens) * triton.cdiv(weight.shape[0], rows)
    each = each or (8 if tokens <= 32 else 2 if tokens == 64 else 1)
    # Scaling sums over a group costs less than scaling weights, where there are registers for a second sum or third.
    fold = int(tokens <= (128 if weight.bias is None else 64))
    split = split_for(steps, blocks, each * _MULTIPROCESSORS)
    return Config({"ROWS": rows, "TOKENS": tokens, "STEP": step, "SPLIT": split, "FOLD": fold}, warps, stages)


def linear_packed(x: Tensor, weight: SpanCodes, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """`Ops.linear`: x [M, K] float16, bfloat16 or float32 -> [M, N] in its dtype, the same bits each time."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    x = _in_order(x, weight)
    config = config or default(x.shape[0], weight, x.dtype)
    if "EXPAND" in config.blocks:
        return F.linear(x, expanded(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    return _launch(x, weight, bias, config)


def _in_order(x: Tensor, weight: SpanCodes) -> Tensor:
    if weight.order is not None:
        return x.index_select(1, weight.order)
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(x: Tensor, weight: SpanCodes, bias: Tensor | None, config: Config) -> Tensor:
    (m, k), n, blocks = x.shape, weight.shape[0], config.blocks
    grid = (triton.cdiv(m, blocks["TOKENS"]), triton.cdiv(n, blocks["ROWS"]), blocks["SPLIT"])
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    parts = room_for_parts(blocks["SPLIT"], out, grid[0] * grid[1], weight.arrivals)
    _linear[grid](
        x, weight.words, weight.scale, weight.zero, weight.bias, bias, out, parts, weight.arrivals,
        m, n, k, x.stride(0), weight.scale.shape[0],
        BITS=weight.bits, GROUP=weight.group, WORDS=WORDS, ASSEMBLY=x.dtype != torch.float32 and not interpreted(),
        EVEN=k % (weight.span * blocks["STEP"]) == 0, **config.options,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["m"])
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
    # Spans that share a scale.
    PIECE: tl.constexpr = STEP if GROUP >= STEP * SPAN else (GROUP // SPAN if GROUP >= SPAN else 1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row, part = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2)
    steps = tl.cdiv(tl.cdiv(k, SPAN), STEP)
    first, last = steps * part // SPLIT, steps * (part + 1) // SPLIT
    # What scales the sums of a step is loaded a step ahead. Triton does so for operands of products only; and those may
    # not be carried over, or it multiplies from shared memory.
    AHEAD: tl.constexpr = FOLD and GROUP >= STEP * SPAN
    scale, offset = _of_group(scales, biases, first * STEP * SPAN // GROUP, groups, n, row)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range(first, last):
        next_scale, next_offset = scale, offset
        if AHEAD:
            next_scale, next_offset = _of_group(scales, biases, (step + 1) * STEP * SPAN // GROUP, groups, n, row)
        for piece in tl.static_range(STEP // PIECE):
            total = _add_piece(
                total, step * STEP + piece * PIECE, x, words, scales, zeros, biases, scale, offset, row, token,
                m, n, k, x_stride, groups, BITS, GROUP, WORDS, ASSEMBLY, EVEN, PIECE, FOLD, AHEAD,
            )  # fmt: skip
        scale, offset = next_scale, next_offset
    if SPLIT > 1:
        leave(total, parts, arrivals, bias, out, row, token, m, n, SPLIT)
    else:
        finish(total, bias, out, row, token, m, n)


@triton.jit
def _of_group(scales, biases, group, groups, n, row):
    """The scale and the bias of rows in a group as they are stored; anything for a bias that is not."""
    scale = of_group(scales, group, groups, n, row, row < n)
    offset = scale if biases is None else of_group(biases, group, groups, n, row, row < n)
    return scale, offset


@triton.jit
def _add_piece(
    total, span, x, words, scales, zeros, biases, scale, offset, row, token, m, n, k, x_stride, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, ASSEMBLY: tl.constexpr,
    EVEN: tl.constexpr, PIECE: tl.constexpr, FOLD: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """total + W x^T over PIECE spans from `span` on; scale and offset are theirs if AHEAD, and loaded here if not."""
    PLACES: tl.constexpr = 16 // BITS
    ALIKE: tl.constexpr = PLACES if GROUP >= PLACES * WORDS else GROUP // WORDS  # places that share a scale
    TYPE: tl.constexpr = x.dtype.element_ty
    j = tl.arange(0, PIECE * WORDS)
    at = (span + j // WORDS).to(tl.int64)[None, :] * (n * WORDS) + row[:, None] * WORDS + (j % WORDS)[None, :]
    codes = tl.load(words + at, (row < n)[:, None], other=0)
    column = (span + j // WORDS) * (WORDS * PLACES) + j % WORDS
    for place in tl.static_range(PLACES):
        at_x = x + token.to(tl.int64)[None, :] * x_stride + (column + place * WORDS)[:, None]
        held = (token < m)[None, :]
        if not EVEN:
            held = held & (column + place * WORDS < k)[:, None]
        inputs = tl.load(at_x, held, other=0.0)
        if place % ALIKE == 0:
            group = (span * PLACES + place) * WORDS // GROUP
            if not AHEAD:
                scale, offset = _of_group(scales, biases, group, groups, n, row)
            factor, zero = scale.to(tl.float32), tl.full(row.shape, 1 << (BITS - 1), tl.float32)
            if zeros is not None:
                zero = of_group(zeros, group, groups, n, row, row < n).to(tl.float32)
            more = offset.to(tl.float32) + zero * factor
        value = codes_less(codes, zero, place, TYPE, BITS, ASSEMBLY)
        if FOLD:
            if place % ALIKE == 0:
                some, inputs_sum = tl.zeros_like(total), tl.zeros_like(total)
            some = tl.dot(value, inputs, some, input_precision="ieee")
            if biases is not None:
                # Tensor cores have time for it; a sum over threads would wait.
                ones = tl.full([row.shape[0], PIECE * WORDS], 1.0, tl.float32).to(TYPE)
                inputs_sum = tl.dot(ones, inputs, inputs_sum, input_precision="ieee")
            if place % ALIKE == ALIKE - 1:
                total += some * factor[:, None]
                if biases is not None:
                    total += inputs_sum * more[:, None]
        else:
            wide = value.to(tl.float32) * factor[:, None]
            if biases is not None:
                wide += more[:, None]
            total = tl.dot(wide.to(TYPE), inputs, total, input_precision="ieee")
    return total
