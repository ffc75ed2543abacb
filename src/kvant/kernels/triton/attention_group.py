"""Decode attention on tensor cores: the query heads of a KV head are the rows of one tile."""

from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.attention_parts import decoded_length, part_of
from kvant.kernels.triton.kv_centre import centre_scores, centre_terms, turn_speeds
from kvant.kernels.triton.kv_tiles import capped, places, shaped_query, tile_steps, vectors, width_of


@triton.jit(do_not_specialize=["table_stride"])
def attend_group(
    q, sums, tops, starts, lengths, tables, scale, q_stride, table_stride,
    k_codes, k_meta, k_scale, k_balance, v_codes, v_meta, v_scale, v_balance, centre, frequencies, basis,
    K_KIND: tl.constexpr, K_STEPS: tl.constexpr, K_GROUPS: tl.constexpr, K_CODE_STRIDE: tl.constexpr,
    K_META_STRIDE: tl.constexpr, K_HADAMARD: tl.constexpr, K_TYPE: tl.constexpr,
    V_KIND: tl.constexpr, V_STEPS: tl.constexpr, V_GROUPS: tl.constexpr, V_CODE_STRIDE: tl.constexpr,
    V_META_STRIDE: tl.constexpr, V_HADAMARD: tl.constexpr, V_TYPE: tl.constexpr,
    ORDER: tl.constexpr, TURNING: tl.constexpr, SINKS: tl.constexpr, LEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    CENTRE_TILE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Up to 16 query heads of a KV head over a part of its context."""
    sequence, split = tl.program_id(0), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    head, member = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS * ROWS
    length = decoded_length(starts, lengths, sequence)
    low, end, begin = part_of(length, split, WINDOW, SINKS, TILE, SPLITS)
    if low >= end:
        return
    K_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(width_of(K_KIND, DIM)))
    V_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(width_of(V_KIND, DIM)))
    table = tables + sequence * table_stride
    row = member + tl.arange(0, ROWS)[:, None]
    held = row < GROUP
    query = q + tl.load(starts + sequence).to(tl.int64) * q_stride + (head * GROUP + row) * DIM
    balance = None if k_balance is None else k_balance + head * DIM
    even, odd = shaped_query(query, held, balance, scale, K_KIND, K_HADAMARD, ROWS, DIM, K_WIDTH)
    even, odd = even.to(K_TYPE), odd.to(K_TYPE)
    # As rounded: shifts are large, and what queries lose must not be multiplied with them.
    total_q = tl.sum(even.to(tl.float32), 1)
    if K_KIND == "u4":
        total_q += tl.sum(odd.to(tl.float32), 1)
    if ORDER > 0:
        FEW: tl.constexpr = min(ROWS, triton.next_power_of_2(GROUP))
        few = member + tl.arange(0, FEW)[:, None, None]
        with_cos, with_sin, with_none = centre_terms(
            q + tl.load(starts + sequence).to(tl.int64) * q_stride + (head * GROUP + few) * DIM, few < GROUP,
            centre + head * ORDER * DIM, scale, FEW, ORDER, TURNING, DIM,
        )  # fmt: skip
        speeds = turn_speeds(frequencies, TURNING)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    low_sum = tl.zeros([ROWS, V_WIDTH], tl.float32)
    high_sum = tl.zeros([ROWS, V_WIDTH], tl.float32)
    for start in range(begin, end, TILE):
        tokens = start + tl.arange(0, TILE)
        # Tokens outside are taken for the nearest inside, whose vectors are there.
        positions = tl.minimum(tl.maximum(tokens, low), end - 1)
        blocks, slots = places(table, start, positions, head, LEAD, BLOCK_SIZE, TILE)
        low_keys, high_keys = vectors(
            k_codes, k_meta, k_scale, head, blocks, slots, K_KIND, K_STEPS, K_GROUPS, K_CODE_STRIDE, K_META_STRIDE,
            DIM, K_WIDTH, K_TYPE, False,
        )  # fmt: skip
        low_values, high_values = vectors(
            v_codes, v_meta, v_scale, head, blocks, slots, V_KIND, V_STEPS, V_GROUPS, V_CODE_STRIDE, V_META_STRIDE,
            DIM, V_WIDTH, V_TYPE, True,
        )  # fmt: skip
        scores = tl.dot(even, tl.trans(low_keys), input_precision="ieee")
        if K_KIND == "u4":
            scores = tl.dot(odd, tl.trans(high_keys), scores, input_precision="ieee")
        if K_STEPS != "none" and K_GROUPS == 1:
            step, shift = tile_steps(k_meta, k_scale, head, blocks, slots, K_STEPS, K_GROUPS, K_META_STRIDE)
            scores = scores * step[None, :] - total_q[:, None] * shift[None, :]
        if ORDER > 0:
            common = centre_scores(with_cos, with_sin, with_none, speeds, basis, start, ORDER, CENTRE_TILE, TILE)
            scores += tl.reshape(tl.broadcast_to(common[None, :, :], [ROWS // FEW, FEW, TILE]), [ROWS, TILE])
        scores = tl.where((tokens == positions)[None, :], capped(scores, SOFTCAP), -float("inf"))
        next_top = tl.maximum(top, tl.max(scores, 1))
        kept = tl.exp2(top - next_top)
        weights = tl.exp2(scores - next_top[:, None])
        total = total * kept + tl.sum(weights, 1)
        top = next_top
        weights = weights.to(V_TYPE)
        low_sum = tl.dot(weights, low_values, low_sum * kept[:, None], input_precision="ieee")
        if V_KIND == "u4":
            high_sum = tl.dot(weights, high_values, high_sum * kept[:, None], input_precision="ieee")
    if V_STEPS == "static":
        low_sum *= tl.load(v_scale + head)
    column = tl.arange(0, V_WIDTH)[None, :]
    part = (sequence * HEADS + head * GROUP + row) * SPLITS + split
    flat = tl.reshape(part, [ROWS])
    tl.store(tops + flat * 2, top, member + tl.arange(0, ROWS) < GROUP)
    tl.store(tops + flat * 2 + 1, total, member + tl.arange(0, ROWS) < GROUP)
    at = sums + part.to(tl.int64) * DIM
    inside = held & (column < width_of(V_KIND, DIM))
    if V_KIND == "u4":
        tl.store(at + 2 * column, low_sum, inside)
        tl.store(at + 2 * column + 1, high_sum, inside)
    else:
        tl.store(at + column, low_sum, inside)
