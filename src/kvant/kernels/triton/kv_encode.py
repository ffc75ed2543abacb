"""How kernels turn vectors into a cache's codes: `formats.kv_codecs`, a tile [tokens, BLOCK] of one KV head at a time.

BLOCK is the power of two that a vector's WIDTH elements fit in; `at` are the elements' numbers, and elements from WIDTH
on are zero. `kv_layout.Side` says what the kinds of codes and of steps are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvant.formats.kv_stats import CENTRE_TILE
from kvant.kernels.triton.kv_layout import Side, basis
from kvant.kernels.triton.rounding import float8, rint

_TILE = tl.constexpr(CENTRE_TILE)


class Stored(NamedTuple):
    """A `Side` as an argument of kernels: None for what a layer does not have, `constexpr` for what is compiled in.

    `waiting` [T, KV_HEADS, WIDTH] float32 has room for a step's vectors that `kv_feedback` is to round.
    """

    codes: Any
    meta: Any
    waiting: Any
    code_stride: int
    meta_stride: int
    coefficients: Any
    frequencies: Any
    basis: Any
    balance: Any
    scales: Any
    feedback: Any
    kind: Any
    steps: Any
    groups: Any
    words: Any
    levels: Any
    order: Any
    turning: Any


def stored(side: Side, waiting: Tensor | None = None) -> Stored:
    """The argument for a side: `words` of `meta` for a vector, Hadamard blocks of size 2^levels."""
    stats, centre = side.stats, side.stats.centre
    return Stored(
        side.codes,
        side.meta,
        waiting,
        side.code_stride,
        side.meta_stride,
        None if centre is None else centre.coefficients,
        None if centre is None else centre.frequencies,
        None if centre is None else basis(side.order, side.codes.device),
        stats.balance,
        stats.scale,
        stats.feedback,
        *(
            tl.constexpr(fact)
            for fact in (
                side.kind,
                side.steps,
                side.groups,
                0 if side.meta is None else side.meta.shape[-1],
                side.hadamard.bit_length() - 1,
                side.order,
                side.turning,
            )
        ),
    )


@triton.jit
def shape(x, at, positions, head, side, WIDTH: tl.constexpr):
    """What a `ShapedCodec` hands to the codec within; vectors that are not shaped stay as they are."""
    if side.levels > 0:
        x = bounded(x, -1e30, 1e30)
    if side.coefficients is not None:
        x -= _centre(at, positions, head, side, WIDTH)
    if side.balance is not None:
        x *= tl.load(side.balance + head * WIDTH + at, at < WIDTH, other=0.0)[None, :]
    return hadamard(x, side.levels)


@triton.jit
def _centre(at, positions, head, side, WIDTH: tl.constexpr):
    """`Centre.at`: the polynomial in the position within its tile, then turned to the tile's middle."""
    turning: tl.constexpr = side.turning
    first, turns = at < turning, at < 2 * turning
    own = tl.zeros((positions.shape[0], at.shape[0]), tl.float32)
    other = tl.zeros_like(own)
    for j in tl.static_range(side.order):
        factor = tl.load(side.basis + (positions % _TILE) * side.order + j)[:, None]
        row = side.coefficients + (head * side.order + j) * WIDTH
        own += factor * tl.load(row + at, at < WIDTH, other=0.0)[None, :]
        partner = tl.where(first, at + turning, at - turning)
        other += factor * tl.load(row + partner, turns, other=0.0)[None, :]
    # Far into a text an angle is many turns, of which float32 would leave few digits.
    middles = (positions // _TILE * _TILE).to(tl.float64) + (_TILE - 1) / 2
    frequency = tl.load(side.frequencies + tl.where(first, at, at - turning), turns, other=0.0).to(tl.float64)
    angles = middles[:, None] * frequency[None, :]
    angles = (angles - tl.floor(angles * 0.15915494309189535 + 0.5) * 6.283185307179586).to(tl.float32)
    return own * tl.cos(angles) + tl.where(first[None, :], -other, other) * tl.sin(angles)


@triton.jit
def hadamard(x, LEVELS: tl.constexpr):
    """x [rows, BLOCK] times Sylvester's orthonormal matrix, in blocks of 2^LEVELS elements."""
    rows: tl.constexpr = x.shape[0]
    block: tl.constexpr = x.shape[1]
    size: tl.constexpr = 2**LEVELS
    for _ in tl.static_range(LEVELS):
        # Sums of neighbours first, then their differences: after all levels every element is back in its place.
        even, odd = tl.split(tl.reshape(x, (rows * block // size, size // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (rows, block))
    return x * (size**-0.5)


@triton.jit
def store_vectors(x, at, head, kept, codes, meta, side, WIDTH: tl.constexpr):
    """Store x where `kept`; `codes` and `meta` [tokens] point to where the planes have each token's vector."""
    if side.steps == "none":
        inside = kept[:, None] & (at < WIDTH)[None, :]
        if codes.dtype.element_ty == tl.float16:
            x = bounded(x, -65504.0, 65504.0)
        elif codes.dtype.element_ty == tl.bfloat16:
            x = bounded(x, -3.3895313892515355e38, 3.3895313892515355e38)
        tl.store(codes[:, None] + at[None, :], x.to(codes.dtype.element_ty), inside)
    else:
        if side.steps == "affine":
            code = _affine(x, at, kept, meta, side, WIDTH)
        elif side.steps == "words":
            code = _grouped(x, at, kept, meta, side, WIDTH)
        elif side.steps == "scale":
            code = _symmetric(x, kept, meta)
        else:
            code = _static(x / tl.load(side.scales + head), side)
        _store_codes(code, at, kept, codes, side, WIDTH)


@triton.jit
def store_sinks(x, at, kept, codes, WIDTH: tl.constexpr):
    """The float16 bytes of x, over the codes of consecutive slots; `codes` [tokens] point to the first."""
    half = bounded(x, -65504.0, 65504.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    inside = kept[:, None] & (at < WIDTH)[None, :]
    tl.store(codes[:, None] + 2 * at[None, :], (half & 255).to(tl.uint8), inside)
    tl.store(codes[:, None] + 2 * at[None, :] + 1, ((half >> 8) & 255).to(tl.uint8), inside)


@triton.jit
def _store_codes(code, at, kept, codes, side, WIDTH: tl.constexpr):
    """Integers as bytes, or two to a byte."""
    code = code.to(tl.int32)
    if side.kind == "u4":
        rows: tl.constexpr = code.shape[0]
        block: tl.constexpr = code.shape[1]
        even, odd = tl.split(tl.reshape(code, (rows, block // 2, 2)))
        at = tl.arange(0, block // 2)
        inside = kept[:, None] & (at < WIDTH // 2)[None, :]
        tl.store(codes[:, None] + at[None, :], (even | (odd << 4)).to(tl.uint8), inside)
    else:
        inside = kept[:, None] & (at < WIDTH)[None, :]
        tl.store(codes[:, None] + at[None, :], (code & 255).to(tl.uint8), inside)


@triton.jit
def _affine(x, at, kept, meta, side, WIDTH: tl.constexpr):
    """`AffineCodec`: codes, whose scale and zero are stored."""
    levels: tl.constexpr = 15.0 if side.kind == "u4" else 255.0
    low = tl.min(tl.where(at[None, :] < WIDTH, x, float("inf")), axis=1)
    high = tl.max(tl.where(at[None, :] < WIDTH, x, float("-inf")), axis=1)
    zero = bounded(low, -65504.0, 65504.0).to(tl.float16)
    scale = bounded((high - zero.to(tl.float32)) / levels, 0.0, 65504.0).to(tl.float16)
    tl.store(meta, scale.to(tl.int16, bitcast=True), kept)
    tl.store(meta + 1, zero.to(tl.int16, bitcast=True), kept)
    step = scale.to(tl.float32)[:, None]
    aims = (x - zero.to(tl.float32)[:, None]) / tl.where(step > 0, step, 1.0)
    return rint(bounded(tl.where(step > 0, aims, 0.0), 0.0, levels))


@triton.jit
def _grouped(x, at, kept, meta, side, WIDTH: tl.constexpr):
    """`GroupedCodec` without feedback: codes, whose words are stored."""
    scales, shifts = store_words(x, at, kept, meta, side, WIDTH)
    return rint(bounded(x / tl.where(scales > 0, scales, 1.0) + shifts, 0.0, 15.0))


@triton.jit
def store_words(x, at, kept, meta, side, WIDTH: tl.constexpr):
    """Store `GroupedCodec`'s words; each element's scale and shift, x.shape: x / scale + shift is to be rounded."""
    size: tl.constexpr = WIDTH // side.groups
    scales, shifts = tl.zeros_like(x), tl.zeros_like(x)
    for group in tl.static_range(side.groups):
        member = ((at >= group * size) & (at < (group + 1) * size))[None, :]
        low = tl.min(tl.where(member, x, float("inf")), axis=1)
        high = tl.max(tl.where(member, x, float("-inf")), axis=1)
        # Wide enough for the span, and for its middle to be within reach of an offset.
        step = tl.maximum((high / 2 - low / 2) / 7.5, tl.abs(high / 2 + low / 2) / 3.875)
        half = tl.minimum(step, 63488.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        bits = (half + 31) >> 5
        scale = (bits << 5).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        eighths = rint(bounded((-low / tl.where(scale > 0, scale, 1.0) - 7.5) * 8, -32.0, 31.0))
        tl.store(meta + group, (bits * 64 + eighths.to(tl.int32) + 32).to(tl.int16), kept)
        scales = tl.where(member, scale[:, None], scales)
        shifts = tl.where(member, 7.5 + eighths[:, None] / 8, shifts)
    return scales, shifts


@triton.jit
def _symmetric(x, kept, meta):
    """`SymmetricCodec`: codes, whose scale is stored."""
    scale = tl.minimum(tl.max(tl.abs(x), axis=1) / 127, 65504.0).to(tl.float16)
    tl.store(meta, scale.to(tl.int16, bitcast=True), kept)
    step = scale.to(tl.float32)[:, None]
    aims = tl.where(step > 0, x / tl.where(step > 0, step, 1.0), 0.0)
    return rint(bounded(aims, -127.0, 127.0))


@triton.jit
def _static(aims, side):
    """`StaticCodec`: the bytes of x / scale."""
    if side.kind == "e4m3":
        return float8(bounded(aims, -448.0, 448.0), 3, 7)
    elif side.kind == "e5m2":
        return float8(bounded(aims, -57344.0, 57344.0), 2, 15)
    else:
        return rint(bounded(aims, -127.0, 127.0))


@triton.jit
def bounded(x, lowest, highest):
    """Elements below and above these become these."""
    return tl.minimum(tl.maximum(x, lowest), highest)
