"""Decode attention where a KV head serves one query head: dots of vectors, on codes as float32."""

from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.attention_parts import part_of
from kvant.kernels.triton.kv_centre import centre_scores, centre_terms, turn_speeds
from kvant.kernels.triton.kv_tiles import (
    capped,
    numbers,
    places,
    raised_nibbles,
    shaped_query,
    steps_at,
    width_of,
)


@triton.jit
def _raw(codes, blocks, slots, STRIDE: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Codes as they are stored, [TILE, GROUPS, SIZE]."""
    column = tl.arange(0, SIZE)[None, None, :]
    at = tl.arange(0, GROUPS)[None, :, None] * (WIDTH // GROUPS) + column
    rows = (blocks * STRIDE + slots * WIDTH)[:, None, None]
    if WIDTH == GROUPS * SIZE:
        raw = tl.load(codes + rows + at)
    else:
        raw = tl.load(codes + rows + at, column < WIDTH // GROUPS, 0)
    return raw


@triton.jit
def _steps(
    meta, scale, head, blocks, slots,
    KIND: tl.constexpr, STEPS: tl.constexpr, STRIDE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Scale and shift of each token and group, [TILE, GROUPS], of codes as `attend_one` has them."""
    words: tl.constexpr = 2 if STEPS == "affine" else GROUPS
    at = (blocks * STRIDE + slots * words)[:, None] + tl.arange(0, GROUPS)[None, :]
    step, shift = steps_at(meta, scale, head, at, STEPS)
    if KIND == "u4":  # raised nibbles are 1 + c / 128
        step *= 128
        shift += step
    return step, shift


@triton.jit
def attend_one(
    q, sums, tops, starts, lengths, tables, scale, q_stride, table_stride,
    k_codes, k_meta, k_scale, k_balance, v_codes, v_meta, v_scale, v_balance, centre, frequencies, basis,
    K_KIND: tl.constexpr, K_STEPS: tl.constexpr, K_GROUPS: tl.constexpr, K_CODE_STRIDE: tl.constexpr,
    K_META_STRIDE: tl.constexpr, K_HADAMARD: tl.constexpr,
    V_KIND: tl.constexpr, V_STEPS: tl.constexpr, V_GROUPS: tl.constexpr, V_CODE_STRIDE: tl.constexpr,
    V_META_STRIDE: tl.constexpr, V_HADAMARD: tl.constexpr,
    ORDER: tl.constexpr, TURNING: tl.constexpr, SINKS: tl.constexpr, LEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    CENTRE_TILE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query head over the context of its KV head, codes as float32."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    low, end, first = part_of(tl.load(lengths + sequence), split, WINDOW, SINKS, TILE, SPLITS)
    if low >= end:
        return
    kv_head = head // (HEADS // KV_HEADS)
    K_WIDTH: tl.constexpr = width_of(K_KIND, DIM)
    V_WIDTH: tl.constexpr = width_of(V_KIND, DIM)
    K_SIZE: tl.constexpr = triton.next_power_of_2(K_WIDTH // K_GROUPS)
    V_SIZE: tl.constexpr = triton.next_power_of_2(V_WIDTH // V_GROUPS)
    table = tables + sequence * table_stride
    query = q + tl.load(starts + sequence).to(tl.int64) * q_stride + head * DIM
    balance = None if k_balance is None else k_balance + kv_head * DIM
    pointers = query + tl.zeros([1, 1], tl.int32)
    even, odd = shaped_query(
        pointers, tl.full([1, 1], 1, tl.int1), balance, scale, K_KIND, K_HADAMARD, 1, DIM, K_GROUPS * K_SIZE
    )
    even, odd = tl.reshape(even, [K_GROUPS, K_SIZE]), tl.reshape(odd, [K_GROUPS, K_SIZE])
    total_q = tl.sum(even + odd if K_KIND == "u4" else even, 1)
    if ORDER > 0:
        one = query + tl.zeros([1, 1, 1], tl.int32)
        with_cos, with_sin, with_none = centre_terms(
            one, tl.full([1, 1, 1], 1, tl.int1), centre + kv_head * ORDER * DIM, scale, 1, ORDER, TURNING, DIM
        )
        speeds = turn_speeds(frequencies, TURNING)
    top, total = -float("inf"), tl.zeros([TILE], tl.float32)
    low_sum = tl.zeros([TILE, V_GROUPS, V_SIZE], tl.float32)
    high_sum = low_sum
    shifted = tl.zeros([TILE, V_GROUPS], tl.float32)
    for start in range(first, end, TILE):
        tokens = start + tl.arange(0, TILE)
        # Tokens outside are taken for the nearest inside, whose vectors are there.
        positions = tl.minimum(tl.maximum(tokens, low), end - 1)
        blocks, slots = places(table, start, positions, kv_head, LEAD, BLOCK_SIZE, TILE)
        keys = _raw(k_codes, blocks, slots, K_CODE_STRIDE, K_WIDTH, K_GROUPS, K_SIZE)
        values = _raw(v_codes, blocks, slots, V_CODE_STRIDE, V_WIDTH, V_GROUPS, V_SIZE)
        k_step, k_shift = _steps(k_meta, k_scale, kv_head, blocks, slots, K_KIND, K_STEPS, K_META_STRIDE, K_GROUPS)
        v_step, v_shift = _steps(v_meta, v_scale, kv_head, blocks, slots, V_KIND, V_STEPS, V_META_STRIDE, V_GROUPS)
        if K_KIND == "u4":
            low_codes, high_codes = raised_nibbles(keys)
            dots = tl.sum(low_codes * even[None, :, :] + high_codes * odd[None, :, :], 2)
        else:
            dots = tl.sum(numbers(keys, K_KIND, tl.float32) * even[None, :, :], 2)
        scores = tl.sum(dots * k_step - k_shift * total_q[None, :], 1)
        if ORDER > 0:
            common = centre_scores(with_cos, with_sin, with_none, speeds, basis, start, ORDER, CENTRE_TILE, TILE)
            scores += tl.reshape(common, [TILE])
        scores = tl.where(tokens == positions, capped(scores, SOFTCAP), -float("inf"))
        next_top = tl.maximum(top, tl.max(scores, 0))
        if next_top > top:
            kept = tl.exp2(top - next_top)
            low_sum *= kept
            high_sum *= kept
            shifted *= kept
            total *= kept
            top = next_top
        weight = tl.exp2(scores - top)
        total += weight
        stepped = weight[:, None] * v_step
        shifted += weight[:, None] * v_shift
        if V_KIND == "u4":
            low_codes, high_codes = raised_nibbles(values)
            low_sum += stepped[:, :, None] * low_codes
            high_sum += stepped[:, :, None] * high_codes
        else:
            low_sum += stepped[:, :, None] * numbers(values, V_KIND, tl.float32)
    shift = tl.sum(shifted, 0)[:, None]
    row = (sequence * HEADS + head) * SPLITS + split
    tl.store(tops + row * 2, top)
    tl.store(tops + row * 2 + 1, tl.sum(total, 0))
    group, column = tl.arange(0, V_GROUPS)[:, None], tl.arange(0, V_SIZE)[None, :]
    inside = column + group * 0 < V_WIDTH // V_GROUPS
    at = group * (V_WIDTH // V_GROUPS) + column
    if V_KIND == "u4":
        tl.store(sums + row.to(tl.int64) * DIM + 2 * at, tl.sum(low_sum, 0) - shift, inside)
        tl.store(sums + row.to(tl.int64) * DIM + 2 * at + 1, tl.sum(high_sum, 0) - shift, inside)
    else:
        tl.store(sums + row.to(tl.int64) * DIM + at, tl.sum(low_sum, 0) - shift, inside)
