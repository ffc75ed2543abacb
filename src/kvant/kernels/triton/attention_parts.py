"""The parts that a context is attended to in, and how they are put together (Flash-Decoding, Dao et al. 2023).

A part leaves a sum of values, in the space that their codec stores them in, the largest score, and the sum of the
weights relative to it; scores have base 2. A text's sinks, a few vectors in 16 bit, are in no part: `merge` attends to
them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.kv_tiles import capped, hadamard, sink_rows

LOG2E = 1.4426950408889634


@triton.jit
def decoded_length(starts, lengths, sequence):
    """The context of a sequence that has one new token; 0 of any other."""
    count = tl.load(starts + sequence + 1) - tl.load(starts + sequence)
    return tl.where(count == 1, tl.load(lengths + sequence), 0)


@triton.jit
def part_of(length, split, WINDOW: tl.constexpr, SINKS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr):
    """The tokens [low, end) that one split attends to, and the tile that low lies in; none where low >= end."""
    oldest = tl.maximum(length - WINDOW, SINKS) if WINDOW > 0 else tl.minimum(length, SINKS)
    tile = oldest // TILE
    share = tl.cdiv(tl.cdiv(length, TILE) - tile, SPLITS)
    start = (tile + split * share) * TILE
    return tl.maximum(oldest, start), tl.minimum(length, start + share * TILE), start


@triton.jit(do_not_specialize=["table_stride"])
def merge(
    q, out, sums, tops, starts, lengths, tables, scale, q_stride, table_stride, k_codes, v_codes, v_balance,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, V_HADAMARD: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, K_CODE_STRIDE: tl.constexpr, V_CODE_STRIDE: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of a query head's context, and its sinks, put together: its output."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    length = decoded_length(starts, lengths, sequence)
    if length == 0:
        return
    PADDED: tl.constexpr = triton.next_power_of_2(DIM)
    PARTS: tl.constexpr = triton.next_power_of_2(SPLITS)
    part, column = tl.arange(0, PARTS), tl.arange(0, PADDED)
    low, end, _ = part_of(length, part, WINDOW, SINKS, TILE, SPLITS)
    there, inside = (low < end) & (part < SPLITS), column < DIM
    rows = (sequence * HEADS + head) * SPLITS + part
    part_tops = tl.load(tops + rows * 2, there, -float("inf"))
    top = tl.max(part_tops, 0)
    query = q + tl.load(starts + sequence).to(tl.int64) * q_stride + head * DIM
    if SINKS > 0:
        which = tl.arange(0, triton.next_power_of_2(SINKS))
        seen = (which < tl.minimum(SINKS, length)) & ((WINDOW == 0) | (which >= length - WINDOW))
        block = tl.load(tables + sequence * table_stride)
        mask = seen[:, None] & inside[None, :]
        k_rows = sink_rows(k_codes + block * K_CODE_STRIDE, kv_head, which, K_KIND, DIM, BLOCK_SIZE, SPAN)
        v_rows = sink_rows(v_codes + block * V_CODE_STRIDE, kv_head, which, V_KIND, DIM, BLOCK_SIZE, SPAN)
        raw = tl.load(query + column, inside, 0).to(tl.float32) * scale
        sink_keys = tl.load(k_rows[:, None] + column[None, :], mask, 0).to(tl.float32)
        sink_values = tl.load(v_rows[:, None] + column[None, :], mask, 0).to(tl.float32)
        scores = capped(tl.sum(sink_keys * raw[None, :], 1), SOFTCAP)
        scores = tl.where(seen, scores, -float("inf"))
        top = tl.maximum(top, tl.max(scores, 0))
    weights = tl.where(there, tl.exp2(part_tops - top), 0.0)
    total = tl.sum(tl.load(tops + rows * 2 + 1, there, 0) * weights, 0)
    parts = tl.load(sums + rows.to(tl.int64)[:, None] * DIM + column[None, :], there[:, None] & inside[None, :], 0)
    mixed = tl.sum(parts * weights[:, None], 0)
    mixed = tl.reshape(hadamard(mixed[None, :], 1, PADDED, V_HADAMARD), [PADDED]) * V_HADAMARD**-0.5
    if v_balance is not None:
        mixed /= tl.load(v_balance + kv_head * DIM + column, inside, 1.0)
    if SINKS > 0:
        sink_weights = tl.where(seen, tl.exp2(scores - top), 0.0)
        total += tl.sum(sink_weights, 0)
        mixed += tl.sum(sink_values * sink_weights[:, None], 0)
    token = tl.load(starts + sequence).to(tl.int64)
    tl.store(out + (token * HEADS + head) * DIM + column, (mixed / total).to(out.dtype.element_ty), inside)
