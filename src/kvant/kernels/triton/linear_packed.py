"""Products with matrices of few bits, whose codes become floats in registers.

The matrix is the left operand, x^T the right one. So few tokens fill tensor cores, whose right operand may be narrow,
and what is unpacked is multiplied from registers, without a way through shared memory.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvant.kernels.triton.embedding import expanded
from kvant.kernels.triton.launch import Config, interpreted
from kvant.kernels.triton.span_codes import codes_less, loads_words, meant, values, word_of
from kvant.kernels.triton.sums import finish, leave, room_for_parts, split_for
from kvant.kernels.triton.weights import QUARTER, WORDS, SpanCodes

# Tokens from which a matrix that is expanded to 16 bits first is multiplied faster, by cuBLAS.
_MANY = 128
_MANY_IN_FLOAT32 = 16  # there tensor cores are of no use
_MULTIPROCESSORS = 132
EXPAND = Config({"EXPAND": 1})


def key(m: int, weight: SpanCodes, dtype: torch.dtype) -> str:
    """What the best configuration depends on: "m8 n4096 k4096 int4 g128 zero float16".

    m is 1, or the next power of two from 8 on.
    """
    (n, k), group, name = weight.shape, min(weight.group, weight.shape[1]), str(dtype).removeprefix("torch.")
    return f"m{_tokens(m) if m > 1 else 1} n{n} k{k} int{weight.bits} g{group} {weight.kind} {name}"


def default(m: int, weight: SpanCodes, dtype: torch.dtype) -> Config:
    """A good configuration for any card."""
    if m > (_MANY_IN_FLOAT32 if dtype == torch.float32 else _MANY):
        return EXPAND
    tokens = min(_tokens(m), 64)  # for 128 at a time, smaller cards have too little shared memory
    fold = int(tokens < (16 if weight.kind == "bias" else 64))
    return _config(m, weight, 128, tokens, 256 if tokens <= 32 else 128, 4, 3, {32: 2, 64: 1}.get(tokens, 3), fold)


def candidates(m: int, weight: SpanCodes, dtype: torch.dtype) -> list[Config]:
    """What is worth a measurement."""
    found, tokens = [default(m, weight, dtype)], min(_tokens(m), 128)
    tiles, loops, often = [(128, 2, 1), (128, 4, 1)], [(128, 3), (256, 3), (256, 4)], [2, 3, 5]
    if tokens >= 64:
        tiles, loops, often = [(128, 4, 0), (256, 8, 0), (128, 8, 1)], [(128, 3), (256, 2), (256, 3)], [1, 2]
    elif weight.kind == "bias":  # to fold it takes another product
        tiles.append((128, 4, 0))
    widths = [tokens] if tokens < 128 else [64, 128]
    found += [EXPAND] * (tokens == 128)
    found += [
        _config(m, weight, rows, width, depth, warps, stages, each, fold)
        for width, (rows, warps, fold), (depth, stages), each in product(widths, tiles, loops, often)
    ]
    return [config for at, config in enumerate(found) if config not in found[:at]]


def _tokens(m: int) -> int:
    return int(max(8, triton.next_power_of_2(m)))  # tensor cores take no fewer


def _config(
    m: int, weight: SpanCodes, rows: int, tokens: int, depth: int, warps: int, stages: int, each: int, fold: int
) -> Config:
    """A program computes so many rows of so many tokens, `depth` columns at a time.

    Sums are cut for about `each` programs on a multiprocessor. To `fold` is to scale sums over a group, not weights:
    it rounds nothing, and costs less where tokens are few.
    """
    step = min(4, 4 * depth // weight.span)
    steps = triton.cdiv(weight.shape[1], weight.span) * (4 // step)
    blocks = triton.cdiv(m, tokens) * triton.cdiv(weight.shape[0], rows)
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
        x, weight.words, weight.steps, weight.unit, bias, out, parts, weight.arrivals,
        m, n, k, x.stride(0), triton.cdiv(k, weight.group),
        BITS=weight.bits, GROUP=weight.group, KIND=weight.kind, WORDS=WORDS, QUARTER=QUARTER,
        ASSEMBLY=x.dtype != torch.float32 and not interpreted(), WHOLE=n % blocks["ROWS"] == 0,
        EVEN=k % weight.span == 0, **config.options,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["m"])
def _linear(
    x, words, steps, unit, bias, out, parts, arrivals, m, n, k, x_stride, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, WORDS: tl.constexpr, QUARTER: tl.constexpr,
    ASSEMBLY: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    STEP: tl.constexpr, SPLIT: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """A program: ROWS outputs of TOKENS tokens, over one of SPLIT parts of K; STEP quarters of a span at a time.

    bias and parts may be None.
    """
    SPAN: tl.constexpr = WORDS * (16 // BITS)
    # Quarters in which codes at a place share a scale.
    PIECE: tl.constexpr = STEP if GROUP >= STEP * QUARTER else GROUP // QUARTER
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row, part = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(2)
    count = tl.cdiv(k, SPAN) * (4 // STEP)
    first, last = count * part // SPLIT, count * (part + 1) // SPLIT
    span, j = first * STEP // 4, first * STEP % 4 * QUARTER + tl.arange(0, PIECE * QUARTER)
    # Carried on from step to step: to compute them anew would take a quarter of all instructions.
    codes_at = words + span.to(tl.int64) * (n * WORDS) + (row[:, None] * WORDS + j[None, :])
    inputs_at = x + token.to(tl.int64)[None, :] * x_stride + (span * SPAN + j)[:, None]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for step in range(first, last):
        for piece in tl.static_range(STEP // PIECE):
            total = _add_piece(
                total, step * STEP + piece * PIECE, codes_at + piece * PIECE * QUARTER,
                inputs_at + piece * PIECE * QUARTER, steps, row, token, m, n, k, groups,
                BITS, GROUP, KIND, WORDS, QUARTER, ASSEMBLY, WHOLE, EVEN, PIECE, FOLD,
            )  # fmt: skip
        if ASSEMBLY and not FOLD:
            total = _arrived(total)
        ends = (step + 1) * STEP % 4 == 0
        codes_at += tl.where(ends, n * WORDS - (4 - STEP) * QUARTER, STEP * QUARTER)
        inputs_at += tl.where(ends, SPAN - (4 - STEP) * QUARTER, STEP * QUARTER)
    total *= unit
    if SPLIT > 1:
        leave(total, parts, arrivals, bias, out, row, token, m, n, SPLIT)
    else:
        finish(total, bias, out, row, token, m, n)


@triton.jit
def _arrived(total):
    """The sums, unchanged, when the product that they come from has ended.

    Triton lets the last product of a loop's body go on until the next begins. With an operand in registers ptxas then
    does not see which registers are free, and lets none of the body's products begin before the one before has ended.
    """
    return tl.inline_asm_elementwise("// $0", "=f,0", [total], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _add_piece(
    total, quarter, codes_at, inputs_at, steps, row, token, m, n, k, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, WORDS: tl.constexpr, QUARTER: tl.constexpr,
    ASSEMBLY: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, PIECE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """total + W x^T over PIECE quarters of a span, from `quarter` of all on."""
    PLACES: tl.constexpr = 16 // BITS
    ALIKE: tl.constexpr = min(PLACES, max(1, GROUP // WORDS))  # places that share a scale
    APART: tl.constexpr = max(1, WORDS // GROUP)
    TYPE: tl.constexpr = inputs_at.dtype.element_ty
    inside = row < n
    codes = tl.load(codes_at) if WHOLE else tl.load(codes_at, inside[:, None], other=0)
    for place in tl.static_range(PLACES):
        start = (quarter // 4 * PLACES + place) * WORDS + quarter % 4 * QUARTER
        held = (token < m)[None, :]
        if not EVEN:
            held = held & (start + tl.arange(0, PIECE * QUARTER) < k)[:, None]
        inputs = tl.load(inputs_at + place * WORDS, held, other=0.0)
        if place % ALIKE == 0:
            group = start // GROUP
            if loads_words(place, ALIKE, KIND):
                word = word_of(steps, group, groups, n, row, inside, KIND, APART)
            scale, zero, bias = meant(word, group, groups, KIND, BITS, APART)
            some, sums = tl.zeros_like(total), tl.zeros_like(total)
        if FOLD:
            value = codes_less(codes, zero, place, TYPE, BITS, ASSEMBLY)
            some = tl.dot(value, inputs, some, input_precision="ieee")
            if KIND == "bias":
                # Tensor cores have time for it; a sum over threads would wait.
                ones = tl.full(codes.shape, 1.0, tl.float32).to(TYPE)
                sums = tl.dot(ones, inputs, sums, input_precision="ieee")
            if place % ALIKE == ALIKE - 1:
                total += some * scale[:, None]
                if KIND == "bias":
                    total += sums * bias[:, None]
        else:
            value = values(codes, zero, scale, bias, place, TYPE, BITS, ASSEMBLY)
            total = tl.dot(value, inputs, total, input_precision="ieee")
    return total
