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
def part_of(
    length, split, least, WINDOW: tl.constexpr, SINKS: tl.constexpr, LEAD: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The slots [low, end) of a sequence that one split attends to, and the beginning of the tile that low lies in.

    There are no more parts than have so many tiles. Where low >= end there are none. Token t is in slot t + LEAD.
    """
    oldest = LEAD + (tl.maximum(length - WINDOW, SINKS) if WINDOW > 0 else tl.minimum(length, SINKS))
    tile = oldest // TILE
    tiles = tl.cdiv(length + LEAD, TILE) - tile
    share = tl.cdiv(tiles, tl.minimum(tl.maximum(tiles // least, 1), SPLITS))
    start = (tile + split * share) * TILE
    return tl.maximum(oldest, start), tl.minimum(length + LEAD, start + share * TILE), start


@triton.jit
def completed(
    mixed, top, total, query, held, table, length, head, scale, k_codes, v_codes, v_balance,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, V_HADAMARD: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, K_CODE_STRIDE: tl.constexpr, V_CODE_STRIDE: tl.constexpr, DIM: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Outputs [ROWS, SIZE] of query heads, from sums of values as they are stored, top scores [ROWS], and totals.

    query are pointers to the heads' rows, [ROWS, 1], and `held` says which there are. Sinks are attended to.
    """
    column = tl.arange(0, mixed.shape[1])[None, :]
    inside = column < DIM
    mixed = hadamard(mixed, mixed.shape[0], mixed.shape[1], V_HADAMARD) * V_HADAMARD**-0.5
    if v_balance is not None:
        mixed /= tl.load(v_balance + head * DIM + column, inside, 1.0)
    if SINKS > 0:
        which = tl.arange(0, triton.next_power_of_2(SINKS))
        seen = (which < tl.minimum(SINKS, length)) & ((WINDOW == 0) | (which >= length - WINDOW))
        block = tl.load(table)
        k_rows = sink_rows(k_codes + block * K_CODE_STRIDE, head, which, K_KIND, DIM, BLOCK_SIZE, SPAN)
        v_rows = sink_rows(v_codes + block * V_CODE_STRIDE, head, which, V_KIND, DIM, BLOCK_SIZE, SPAN)
        raw = tl.load(query + column, held & inside, 0).to(tl.float32) * scale
        sink_keys = tl.load(k_rows[:, None] + column, seen[:, None] & inside, 0).to(tl.float32)
        sink_values = tl.load(v_rows[:, None] + column, seen[:, None] & inside, 0).to(tl.float32)
        scores = capped(tl.sum(sink_keys[None, :, :] * raw[:, None, :], 2), SOFTCAP)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        kept, weights = tl.exp2(top - highest), tl.exp2(scores - highest[:, None])
        total = total * kept + tl.sum(weights, 1)
        mixed = mixed * kept[:, None] + tl.sum(weights[:, :, None] * sink_values[None, :, :], 1)
    return mixed / total[:, None]


@triton.jit(do_not_specialize=["table_stride", "least"])
def merge(
    q, out, sums, tops, starts, lengths, tables, scale, q_stride, table_stride, least, k_codes, v_codes, v_balance,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, V_HADAMARD: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr,
    LEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, K_CODE_STRIDE: tl.constexpr, V_CODE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr,
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
    low, end, _ = part_of(length, part, least, WINDOW, SINKS, LEAD, TILE, SPLITS)
    there, inside = (low < end) & (part < SPLITS), column < DIM
    rows = (sequence * HEADS + head) * SPLITS + part
    part_tops = tl.load(tops + rows * 2, there, -float("inf"))
    top = tl.max(part_tops, 0)
    weights = tl.where(there, tl.exp2(part_tops - top), 0.0)
    total = tl.sum(tl.load(tops + rows * 2 + 1, there, 0) * weights, 0)
    parts = tl.load(sums + rows.to(tl.int64)[:, None] * DIM + column[None, :], there[:, None] & inside[None, :], 0)
    mixed = tl.sum(parts * weights[:, None], 0)
    token = tl.load(starts + sequence).to(tl.int64)
    one = tl.full([1], 1, tl.int1)
    found = completed(
        mixed[None, :], top + tl.zeros([1], tl.float32), total + tl.zeros([1], tl.float32),
        q + token * q_stride + head * DIM + tl.zeros([1, 1], tl.int32), one[:, None], tables + sequence * table_stride,
        length, kv_head, scale, k_codes, v_codes, v_balance,
        K_KIND, V_KIND, V_HADAMARD, SINKS, SPAN, BLOCK_SIZE, K_CODE_STRIDE, V_CODE_STRIDE, DIM, WINDOW, SOFTCAP,
    )  # fmt: skip
    to = out + (token * HEADS + head) * DIM + column[None, :]
    tl.store(to, found.to(out.dtype.element_ty), inside[None, :])
