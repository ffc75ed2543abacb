"""RoPE, and the keys and values of a step's tokens written to the cache: a launch, and one more where feedback is.

A program has one head of a few tokens: a query head to rotate, or a key or a value head to store.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvant.formats.kv import SINK_SPAN, KVLayer
from kvant.kernels.ops import AttentionBatch
from kvant.kernels.triton.kv_encode import shape, store_sinks, store_vectors, store_words, stored
from kvant.kernels.triton.kv_feedback import round_with_feedback
from kvant.kernels.triton.kv_layout import Side, side_of
from kvant.kernels.triton.launch import Config, interpreted
from kvant.kernels.triton.rounding import finite

_SPAN = tl.constexpr(SINK_SPAN)
_FEW = 128  # tokens: more than enough programs for a card


def rope_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    cache: KVLayer,
    batch: AttentionBatch,
    config: Config | None = None,
) -> Tensor:
    """`Ops.rope_write_kv`; elements of a head are contiguous in q, k and v, and rows of the rotary.

    A token whose key or value is not finite is marked in `AttentionBatch.not_finite`.
    """
    tokens, heads, width = q.shape
    out = q if rotary is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    config = config or default(tokens, width, cache)
    programs = 2 * k.shape[1] + (heads if rotary is not None else 0)
    sides = [side_of(cache, name) for name in ("key", "value")]
    waiting = [_room(tokens, side) for side in sides]
    _write[(triton.cdiv(tokens, config.blocks["TOKENS"]), programs)](
        *(_Vectors(x, *x.stride()[:2]) for x in (q, k, v, out)),
        None if rotary is None else _Rotary(*rotary, rotary[0].stride(0), tl.constexpr(rotary[0].shape[1])),
        *map(stored, sides, waiting),
        batch.slots,
        batch.positions,
        batch.not_finite,
        tokens,
        KV_HEADS=k.shape[1],
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        BLOCK_SIZE=cache.block_size,
        LEAD=cache.lead,
        SINKS=cache.format.sinks,
        **config.options,
    )
    for side, vectors in zip(sides, waiting, strict=True):
        if vectors is not None:
            round_with_feedback(vectors, side, cache, batch)
    return out


def _room(tokens: int, side: Side) -> Tensor | None:
    """Where vectors wait to be rounded with feedback, if there is any, of a codec that uses it."""
    if side.stats.feedback is None or side.steps != "words":
        return None
    heads, width, _ = side.stats.feedback.shape
    return torch.empty(tokens, heads, width, dtype=torch.float32, device=side.codes.device)


def key(tokens: int, width: int, cache: KVLayer) -> str:
    """What the best configuration depends on."""
    few = "few" if tokens <= _FEW else "many"
    return f"{few} d{width} {cache.format.name}"


def default(tokens: int, width: int, cache: KVLayer) -> Config:
    """Few tokens are spread over as many programs as can be; of many, each program takes some, two to a warp."""
    if interpreted():  # as fast for a program of many tokens as for one of one
        return Config({"TOKENS": 64}, num_warps=1, num_stages=1)
    if tokens <= _FEW:
        return Config({"TOKENS": 1}, num_warps=1, num_stages=1)
    return Config({"TOKENS": 8}, num_warps=4 if width <= 128 else 8, num_stages=1)


def candidates(tokens: int, width: int, cache: KVLayer) -> list[Config]:
    """What may be faster than the default."""
    sizes = ((1, 1), (1, 2), (2, 1)) if tokens <= _FEW else ((4, 2), (4, 4), (8, 4), (8, 8), (16, 8), (16, 16))
    return [Config({"TOKENS": size}, num_warps=warps, num_stages=1) for size, warps in sizes]


class _Vectors(NamedTuple):
    """Vectors of tokens and heads, and the elements from token to token, and from head to head."""

    data: Tensor
    stride: int
    head_stride: int


class _Rotary(NamedTuple):
    """Cosines and sines, `half` in a row, and the elements from row to row."""

    cos: Tensor
    sin: Tensor
    stride: int
    half: Any


@triton.jit(do_not_specialize=["tokens"])
def _write(
    q,
    k,
    v,
    out,
    rotary,
    keys,
    values,
    slots,
    positions,
    not_finite,
    tokens,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LEAD: tl.constexpr,
    SINKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    at, live, program = tl.arange(0, BLOCK), token < tokens, tl.program_id(1)
    if program >= 2 * KV_HEADS:
        head = program - 2 * KV_HEADS
        x = _rotated(q, token, head, at, live, rotary, WIDTH)
        inside = live[:, None] & (at < WIDTH)[None, :]
        tl.store(out.data + token[:, None] * out.stride + head * out.head_stride + at[None, :], x, inside)
    else:
        slot, position = tl.load(slots + token, live, other=0), tl.load(positions + token, live, other=0)
        # A plane's part of a block: [KV_HEADS, BLOCK_SIZE, what a vector takes].
        block, row = slot // BLOCK_SIZE, (program % KV_HEADS) * BLOCK_SIZE + slot % BLOCK_SIZE
        if program < KV_HEADS:
            x = _rotated(k, token, program, at, live, rotary, WIDTH)
            _mark(x, token, live, not_finite)
            _put(x.to(tl.float32), at, token, live, position, block, row, program, keys, KV_HEADS, WIDTH, LEAD, SINKS)
        else:
            head = program - KV_HEADS
            x = _rotated(v, token, head, at, live, None, WIDTH)
            _mark(x, token, live, not_finite)
            _put(x.to(tl.float32), at, token, live, position, block, row, head, values, KV_HEADS, WIDTH, LEAD, SINKS)


@triton.jit
def _rotated(x, token, head, at, live, rotary, WIDTH: tl.constexpr):
    """One head of the tokens [TOKENS, BLOCK], in its type; zeros from WIDTH on."""
    rows = x.data + token[:, None] * x.stride + head * x.head_stride
    inside = live[:, None] & (at < WIDTH)[None, :]
    own = tl.load(rows + at[None, :], inside, other=0.0)
    if rotary is None:
        return own
    else:
        half: tl.constexpr = rotary.half
        first, turns = (at < half)[None, :], live[:, None] & (at < 2 * half)[None, :]
        pair = token[:, None] * rotary.stride + tl.where(at < half, at, at - half)[None, :]
        cos = tl.load(rotary.cos + pair, turns, other=1.0)
        sin = tl.load(rotary.sin + pair, turns, other=0.0)
        other = tl.load(rows + tl.where(at < half, at + half, at - half)[None, :], turns, other=0.0).to(tl.float32)
        return (own.to(tl.float32) * cos + tl.where(first, -other, other) * sin).to(own.dtype)


@triton.jit
def _mark(x, token, live, not_finite):
    bad = tl.max(tl.where(finite(x.to(tl.float32)), 0, 1), axis=1)
    tl.store(not_finite + token, bad, live & (bad > 0))


@triton.jit
def _put(
    x, at, token, live, position, block, row, head, side, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr,
    LEAD: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Store the tokens' vectors of one KV head on one side of the cache, at a row of a block each."""
    taken: tl.constexpr = WIDTH // 2 if side.kind == "u4" else WIDTH
    codes, meta = side.codes + block * side.code_stride, side.meta
    if meta is not None:
        meta += block * side.meta_stride + row * side.words
    if SINKS > 0:
        # All sinks lie in a sequence's first block: sink m takes the codes of SINK_SPAN slots, from SINK_SPAN m on.
        sink = position < SINKS
        store_sinks(x, at, live & sink, codes + (row - position - LEAD + _SPAN * position) * taken, WIDTH)
        live &= ~sink
    x = shape(x, at, position, head, side, WIDTH)
    if side.waiting is not None:
        store_words(x, at, live, meta, side, WIDTH)
        vectors = side.waiting + (token * KV_HEADS + head) * WIDTH
        tl.store(vectors[:, None] + at[None, :], x, live[:, None] & (at < WIDTH)[None, :])
    else:
        store_vectors(x, at, head, live, codes + row * taken, meta, side, WIDTH)
