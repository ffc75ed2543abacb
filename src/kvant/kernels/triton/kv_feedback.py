"""Vectors in 4 bit whose elements are rounded one after the other: `GroupedCodec` with feedback.

What an element passes on reaches all that follow it. A span of elements receives from those before it by products;
within the span each waits for the one before. So a program takes many vectors: a tile of tokens of one head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.kernels.ops import AttentionBatch
from kvant.kernels.triton.kv_encode import bounded, stored
from kvant.kernels.triton.kv_layout import Side
from kvant.kernels.triton.kv_words import scale_and_zero
from kvant.kernels.triton.launch import interpreted
from kvant.kernels.triton.rounding import rint

_SPAN = tl.constexpr(16)  # elements: a product adds up no fewer
_TOKENS = 16  # the rows of a product on tensor cores


def round_with_feedback(x: Tensor, side: Side, cache: KVLayer, batch: AttentionBatch) -> None:
    """Store a side's vectors x [T, KV_HEADS, WIDTH] float32 of a step's tokens as codes; their words are there already.

    Sinks are left out. x is lost: errors take the elements' place. Products take their factors in TF32, so what is
    passed on is right to a thousandth, and where an aim is as close to the middle of two codes, it may get either.
    """
    tokens, heads, width = x.shape
    rows = 64 if interpreted() else _TOKENS
    _round[(triton.cdiv(tokens, rows), heads)](
        x,
        stored(side),
        batch.slots,
        batch.positions,
        tokens,
        KV_HEADS=heads,
        WIDTH=width,
        BLOCK_SIZE=cache.block_size,
        SINKS=cache.format.sinks,
        TOKENS=rows,
        num_warps=1,
        num_stages=2,
    )


@triton.jit(do_not_specialize=["tokens"])
def _round(
    x,
    side,
    slots,
    positions,
    tokens,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SINKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    size: tl.constexpr = WIDTH // side.groups
    tl.static_assert(side.kind == "u4" and side.steps == "words" and size % 4 == 0, "four codes are of one group")
    head, at = tl.program_id(1), tl.arange(0, _SPAN)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slots + token, token < tokens, other=0)
    kept = (token < tokens) & (tl.load(positions + token, token < tokens, other=0) >= SINKS)
    block, row = slot // BLOCK_SIZE, head * BLOCK_SIZE + slot % BLOCK_SIZE
    codes = side.codes + block * side.code_stride + row * (WIDTH // 2)
    words = side.meta + block * side.meta_stride + row * side.words
    vectors, weights = x + (token * KV_HEADS + head) * WIDTH, side.feedback + head * WIDTH * WIDTH
    end = tl.where(kept, WIDTH, 0)  # of what is stored of a vector
    for first in range(0, WIDTH, _SPAN):
        own = _received(vectors, first, kept, weights, WIDTH)
        for i in tl.static_range(0, _SPAN, 4):
            element = first + i
            there = element < end
            word = tl.load(words + element // size, there, other=0)
            # Beyond the vector, where nothing is stored, any weights will do.
            corner = weights + tl.minimum(element, WIDTH - 4) * (WIDTH + 1)
            errors, low, high = _four(own, at, i, word, corner, WIDTH)
            tl.store(codes + element // 2, low, there)
            tl.store(codes + element // 2 + 1, high, there)
            for j in tl.static_range(4):
                tl.store(vectors + element + j, errors[j], there)
                later = tl.load(corner + j * WIDTH + at - i, first + at < WIDTH, other=0.0)
                own -= errors[j][:, None] * later[None, :]
        tl.debug_barrier()  # others of the program read the errors


@triton.jit
def _received(vectors, first, kept, weights, WIDTH: tl.constexpr):
    """A span of the vectors, less what those before it pass on to it: [TOKENS, _SPAN]."""
    at = tl.arange(0, _SPAN)
    inside = (first + at < WIDTH)[None, :]
    own = tl.load(vectors[:, None] + first + at[None, :], kept[:, None] & inside, other=0.0)
    passed = tl.zeros_like(own)
    for before in range(0, first, _SPAN):
        errors = tl.load(vectors[:, None] + before + at[None, :], kept[:, None], other=0.0)
        weight = tl.load(weights + (before + at)[:, None] * WIDTH + first + at[None, :], inside, other=0.0)
        passed = tl.dot(errors, weight, passed, input_precision="tf32")
    return own - passed


@triton.jit
def _four(x, at, i, word, corner, WIDTH: tl.constexpr):
    """Of four elements of a span, from the i-th on and of one group, the errors, and two bytes of codes.

    They are taken out of the span at once: that takes longer than rounding them. `corner` points to the first one's
    place on the diagonal of the weights.
    """
    scale, zero = scale_and_zero(word, False)
    a, b, c, d = _element(x, at, i), _element(x, at, i + 1), _element(x, at, i + 2), _element(x, at, i + 3)
    a, first = _rounded(a, scale, zero)
    b, second = _rounded(b - a * tl.load(corner + 1), scale, zero)
    c -= a * tl.load(corner + 2) + b * tl.load(corner + WIDTH + 2)
    c, third = _rounded(c, scale, zero)
    d -= a * tl.load(corner + 3) + b * tl.load(corner + WIDTH + 3)
    d, fourth = _rounded(d - c * tl.load(corner + 2 * WIDTH + 3), scale, zero)
    return (a, b, c, d), (first | (second << 4)).to(tl.uint8), (third | (fourth << 4)).to(tl.uint8)


@triton.jit
def _rounded(x, scale, zero):
    """The error of an element's code, and the code."""
    aim = x * (1 / tl.where(scale > 0, scale, 1.0)) + (zero + 8)
    code = rint(bounded(aim, 0.0, 15.0))
    return (aim - code) * scale, code.to(tl.int32)


@triton.jit
def _element(x, at, i):
    """Column i of x; as integers, since adding their zeros is known to change nothing."""
    bits = tl.where(at[None, :] == i, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=1).to(tl.float32, bitcast=True)
