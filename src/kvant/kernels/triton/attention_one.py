"""Decode attention where a KV head serves one query head: dots of vectors, on codes as float32."""

from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.attention_parts import decoded_length, part_of
from kvant.kernels.triton.kv_centre import centre_scores, centre_terms, turn_speeds
from kvant.kernels.triton.kv_tiles import (
    capped,
    numbers,
    places,
    shaped_query,
    steps_at,
    width_of,
    words_of,
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
def _raised(raw, KIND: tl.constexpr, EXACT: tl.constexpr):
    """Codes as float32 between 1 and 2, which takes the fewest instructions: what they are there, `_unit` says.

    Of 4-bit codes the even and the odd ones, else all twice. Floats are as they are.
    """
    if KIND == "u4":
        wide = raw.to(tl.uint32)
        # Unless they must be exact, 16 times smaller: one shift for both halves.
        low = (((wide & 15) << 16) if EXACT else ((wide << 12) & 0xF000)) | 0x3F800000
        high = ((wide << 12) & 0xF0000) | 0x3F800000
        low, high = low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    elif KIND == "u8":
        low = ((raw.to(tl.uint32) << 15) | 0x3F800000).to(tl.float32, bitcast=True)
        high = low
    elif KIND == "s8":
        low = ((raw.to(tl.uint32) << 15) ^ 0x3FC00000).to(tl.float32, bitcast=True)
        high = low
    else:
        low = numbers(raw, KIND, tl.float32)
        high = low
    return low, high


@triton.constexpr_function
def _unit(KIND):
    """How many steps of the (odd) codes lie between 1 and 2."""
    return 128.0 if KIND == "u4" else (256.0 if KIND == "u8" or KIND == "s8" else 1.0)


@triton.constexpr_function
def _zero(KIND):
    """What code 0 is raised to."""
    return 1.0 if KIND == "u4" or KIND == "u8" else (1.5 if KIND == "s8" else 0.0)


@triton.jit
def _steps(
    meta, scale, head, blocks, slots,
    KIND: tl.constexpr, STEPS: tl.constexpr, STRIDE: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Scale (of raised codes) and shift of each token and group, [TILE, GROUPS]."""
    at = (blocks * STRIDE + slots * words_of(STEPS, GROUPS))[:, None] + tl.arange(0, GROUPS)[None, :]
    step, shift = steps_at(meta, scale, head, at, STEPS)
    return step * _unit(KIND), shift


@triton.jit(do_not_specialize=["table_stride"])
def attend_one(
    q, sums, tops, starts, lengths, tables, scale, q_stride, table_stride,
    k_codes, k_meta, k_scale, k_balance, v_codes, v_meta, v_scale, v_balance, centre, frequencies, basis,
    K_KIND: tl.constexpr, K_STEPS: tl.constexpr, K_GROUPS: tl.constexpr, K_CODE_STRIDE: tl.constexpr,
    K_META_STRIDE: tl.constexpr, K_HADAMARD: tl.constexpr,
    V_KIND: tl.constexpr, V_STEPS: tl.constexpr, V_GROUPS: tl.constexpr, V_CODE_STRIDE: tl.constexpr,
    V_META_STRIDE: tl.constexpr, V_HADAMARD: tl.constexpr,
    ORDER: tl.constexpr, TURNING: tl.constexpr, SINKS: tl.constexpr, LEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    CENTRE_TILE: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One query head over the context of its KV head, codes as float32."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = decoded_length(starts, lengths, sequence)
    low, end, first = part_of(length, split, WINDOW, SINKS, TILE, SPLITS)
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
    total_q = tl.sum(even, 1)
    raised_q = total_q * _zero(K_KIND)
    if K_KIND == "u4":
        if not EXACT:
            even *= 16
        raised_q = tl.sum(even, 1) + tl.sum(odd, 1)
        total_q += tl.sum(odd, 1)
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
    raised = tl.zeros([TILE, V_GROUPS], tl.float32)
    for start in range(first, end, TILE):
        tokens = start + tl.arange(0, TILE)
        # Tokens outside are taken for the nearest inside, whose vectors are there.
        positions = tl.minimum(tl.maximum(tokens, low), end - 1)
        blocks, slots = places(table, start, positions, kv_head, LEAD, BLOCK_SIZE, TILE)
        keys = _raw(k_codes, blocks, slots, K_CODE_STRIDE, K_WIDTH, K_GROUPS, K_SIZE)
        values = _raw(v_codes, blocks, slots, V_CODE_STRIDE, V_WIDTH, V_GROUPS, V_SIZE)
        k_step, k_shift = _steps(k_meta, k_scale, kv_head, blocks, slots, K_KIND, K_STEPS, K_META_STRIDE, K_GROUPS)
        v_step, v_shift = _steps(v_meta, v_scale, kv_head, blocks, slots, V_KIND, V_STEPS, V_META_STRIDE, V_GROUPS)
        low_codes, high_codes = _raised(keys, K_KIND, EXACT)
        dots = tl.sum(low_codes * even[None, :, :], 2)
        if K_KIND == "u4":
            dots += tl.sum(high_codes * odd[None, :, :], 2)
        scores = tl.sum((dots - raised_q[None, :]) * k_step - k_shift * total_q[None, :], 1)
        if ORDER > 0:
            common = centre_scores(with_cos, with_sin, with_none, speeds, basis, start, ORDER, CENTRE_TILE, TILE)
            scores += tl.reshape(common, [TILE])
        scores = tl.where(tokens == positions, capped(scores, SOFTCAP), -float("inf"))
        next_top = tl.maximum(top, tl.max(scores, 0))
        kept, top = tl.exp2(top - next_top), next_top
        weight = tl.exp2(scores - top)
        total = total * kept + weight
        stepped = weight[:, None] * v_step
        raised = raised * kept + stepped
        shifted = shifted * kept + weight[:, None] * v_shift
        low_codes, high_codes = _raised(values, V_KIND, EXACT)
        low_sum = low_sum * kept + stepped[:, :, None] * low_codes
        if V_KIND == "u4":
            high_sum = high_sum * kept + stepped[:, :, None] * high_codes
    shift, lift = tl.sum(shifted, 0)[:, None], tl.sum(raised, 0)[:, None] * _zero(V_KIND)
    low_out, high_out = tl.sum(low_sum, 0) - lift, tl.sum(high_sum, 0) - lift
    if V_KIND == "u4" and not EXACT:
        low_out *= 16
    row = (sequence * HEADS + head) * SPLITS + split
    tl.store(tops + row * 2, top)
    tl.store(tops + row * 2 + 1, tl.sum(total, 0))
    group, column = tl.arange(0, V_GROUPS)[:, None], tl.arange(0, V_SIZE)[None, :]
    inside = column + group * 0 < V_WIDTH // V_GROUPS
    at = group * (V_WIDTH // V_GROUPS) + column
    if V_KIND == "u4":
        tl.store(sums + row.to(tl.int64) * DIM + 2 * at, low_out - shift, inside)
        tl.store(sums + row.to(tl.int64) * DIM + 2 * at + 1, high_out - shift, inside)
    else:
        tl.store(sums + row.to(tl.int64) * DIM + at, low_out - shift, inside)
