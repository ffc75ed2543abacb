"""Decode attention on tensor cores: the query heads of a KV head are the rows of one tile."""

from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.attention_parts import part_of
from kvant.kernels.triton.kv_tiles import capped, places, shaped_query, turned_by, vectors, width_of


@triton.jit
def _centre_scores(
    first, second, rest, near, far, basis, speeds, start, PRECISION: tl.constexpr,
    ORDER: tl.constexpr, TERMS: tl.constexpr, CENTRE_TILE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What the queries make of the keys' centre at a tile's tokens, [ROWS, TILE]: see `Centre`."""
    tl.static_assert(CENTRE_TILE % TILE == 0)
    cos, sin = turned_by(start // CENTRE_TILE * CENTRE_TILE + (CENTRE_TILE - 1) / 2, speeds)
    # The queries are turned back instead of the centre being turned there.
    back = first * cos[None, :] + second * sin[None, :]
    weights = tl.dot(back, near, rest, input_precision=PRECISION)
    back = second * cos[None, :] - first * sin[None, :]
    weights = tl.dot(back, far, weights, input_precision=PRECISION)
    term, token = tl.arange(0, TERMS)[:, None], ((start + tl.arange(0, TILE)) % CENTRE_TILE)[None, :]
    curve = tl.load(basis + token * ORDER + term, (term < ORDER) & (token >= 0), 0)
    return tl.dot(weights, curve, input_precision=PRECISION)


@triton.jit
def attend_group(
    q, sums, tops, starts, lengths, tables, scale, q_stride, table_stride,
    k_codes, k_meta, k_scale, k_balance, v_codes, v_meta, v_scale, v_balance, centre, frequencies, basis,
    K_KIND: tl.constexpr, K_STEPS: tl.constexpr, K_GROUPS: tl.constexpr, K_CODE_STRIDE: tl.constexpr,
    K_META_STRIDE: tl.constexpr, K_HADAMARD: tl.constexpr, K_TYPE: tl.constexpr,
    V_KIND: tl.constexpr, V_STEPS: tl.constexpr, V_GROUPS: tl.constexpr, V_CODE_STRIDE: tl.constexpr,
    V_META_STRIDE: tl.constexpr, V_HADAMARD: tl.constexpr, V_TYPE: tl.constexpr, PRECISION: tl.constexpr,
    ORDER: tl.constexpr, TURNING: tl.constexpr, SINKS: tl.constexpr, LEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    CENTRE_TILE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """All query heads of a KV head over a part of its context."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    low, end, begin = part_of(tl.load(lengths + sequence), split, WINDOW, SINKS, TILE, SPLITS)
    if low >= end:
        return
    GROUP: tl.constexpr = HEADS // KV_HEADS
    ROWS: tl.constexpr = max(16, triton.next_power_of_2(GROUP))
    K_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(width_of(K_KIND, DIM)))
    V_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(width_of(V_KIND, DIM)))
    table = tables + sequence * table_stride
    row = tl.arange(0, ROWS)[:, None]
    held = row < GROUP
    query = q + tl.load(starts + sequence).to(tl.int64) * q_stride + (head * GROUP + row) * DIM
    balance = None if k_balance is None else k_balance + head * DIM
    even, odd = shaped_query(query, held, balance, scale, K_KIND, K_HADAMARD, ROWS, DIM, K_WIDTH)
    if K_STEPS == "static":
        even *= tl.load(k_scale + head)
    even, odd = even.to(K_TYPE), odd.to(K_TYPE)
    if ORDER > 0:
        TERMS: tl.constexpr = max(16, triton.next_power_of_2(ORDER))
        PAIRS: tl.constexpr = max(16, triton.next_power_of_2(TURNING))
        PADDED: tl.constexpr = max(16, triton.next_power_of_2(DIM))
        pair, term, column = tl.arange(0, PAIRS), tl.arange(0, TERMS)[None, :], tl.arange(0, PADDED)
        turning, still = pair < TURNING, (column >= 2 * TURNING) & (column < DIM)
        first = tl.load(query + pair[None, :], held & turning[None, :], 0).to(tl.float32) * scale
        second = tl.load(query + TURNING + pair[None, :], held & turning[None, :], 0).to(tl.float32) * scale
        rest = tl.load(query + column[None, :], held & still[None, :], 0).to(tl.float32) * scale
        terms = centre + head * ORDER * DIM + term * DIM
        near = tl.load(terms + pair[:, None], (term < ORDER) & turning[:, None], 0)
        far = tl.load(terms + TURNING + pair[:, None], (term < ORDER) & turning[:, None], 0)
        others = tl.load(terms + column[:, None], (term < ORDER) & still[:, None], 0)
        rest = tl.dot(rest, others, input_precision=PRECISION)
        speeds = tl.load(frequencies + pair, turning, 0)
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
            DIM, K_WIDTH, K_TYPE,
        )  # fmt: skip
        low_values, high_values = vectors(
            v_codes, v_meta, v_scale, head, blocks, slots, V_KIND, V_STEPS, V_GROUPS, V_CODE_STRIDE, V_META_STRIDE,
            DIM, V_WIDTH, V_TYPE,
        )  # fmt: skip
        scores = tl.dot(even, tl.trans(low_keys), input_precision="ieee")
        if K_KIND == "u4":
            scores = tl.dot(odd, tl.trans(high_keys), scores, input_precision="ieee")
        if ORDER > 0:
            scores += _centre_scores(
                first, second, rest, near, far, basis, speeds, start, PRECISION, ORDER, TERMS, CENTRE_TILE, TILE
            )
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
    tl.store(tops + flat * 2, top, tl.arange(0, ROWS) < GROUP)
    tl.store(tops + flat * 2 + 1, total, tl.arange(0, ROWS) < GROUP)
    at = sums + part.to(tl.int64) * DIM
    inside = held & (column < width_of(V_KIND, DIM))
    if V_KIND == "u4":
        tl.store(at + 2 * column, low_sum, inside)
        tl.store(at + 2 * column + 1, high_sum, inside)
    else:
        tl.store(at + column, low_sum, inside)
