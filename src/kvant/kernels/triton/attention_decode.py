"""Attention of one new token a sequence over the paged cache, whose codes are read once and never decoded to keys.

Programs share a context: each takes a part of it, `_merge` puts the parts together (Flash-Decoding, Dao et al. 2023).
What a codec does to keys is done to the query instead, and what it does to values is undone on the sum of the parts.
The sinks, a few vectors in 16 bit, are attended to in `_merge`. Scores have base 2.

Each KV head of a sequence is a program's: `_attend_one` where it serves one query head, with dots of vectors, and
`_attend_group` where it serves more, with tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvant.formats.kv import SINK_SPAN, KVLayer
from kvant.formats.kv_stats import CENTRE_TILE
from kvant.kernels.ops import AttentionBatch, AttentionShape
from kvant.kernels.triton.kv_layout import centre_arguments, side_arguments, side_of
from kvant.kernels.triton.kv_tiles import (
    capped,
    hadamard,
    numbers,
    places,
    raised_nibbles,
    shaped_query,
    sink_rows,
    steps_at,
    turned_by,
    width_of,
)
from kvant.kernels.triton.launch import Config

LOG2E = 1.4426950408889634
# What `_merge` takes of a cache's sides.
_MERGED = ("k_codes", "v_codes", "v_balance", "K_KIND", "V_KIND", "V_HADAMARD", "K_CODE_STRIDE", "V_CODE_STRIDE")


@triton.jit
def part_of(length, split, WINDOW: tl.constexpr, SINKS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr):
    """The tokens [low, end) that one split attends to, and the tile that low lies in; none where low >= end."""
    oldest = tl.maximum(length - WINDOW, SINKS) if WINDOW > 0 else tl.minimum(length, SINKS)
    tile = oldest // TILE
    share = tl.cdiv(tl.cdiv(length, TILE) - tile, SPLITS)
    start = (tile + split * share) * TILE
    return tl.maximum(oldest, start), tl.minimum(length, start + share * TILE), start


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
    """Scale and shift of each token and group, [TILE, GROUPS], of codes as `_attend_one` has them."""
    words: tl.constexpr = 2 if STEPS == "affine" else GROUPS
    at = (blocks * STRIDE + slots * words)[:, None] + tl.arange(0, GROUPS)[None, :]
    step, shift = steps_at(meta, scale, head, at, STEPS)
    if KIND == "u4":  # raised nibbles are 1 + c / 128
        step *= 128
        shift += step
    return step, shift


@triton.jit
def _centre_terms(
    q, centre, scale,
    ORDER: tl.constexpr, TURNING: tl.constexpr, DIM: tl.constexpr, TERMS: tl.constexpr, PAIRS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """The query's products with the centre's coefficients: those that go with cosines, with sines, and with neither."""
    term, pair, column = tl.arange(0, TERMS)[:, None], tl.arange(0, PAIRS)[None, :], tl.arange(0, PADDED)[None, :]
    paired = (term < ORDER) & (pair < TURNING)
    first = tl.load(q + pair, pair < TURNING, 0).to(tl.float32) * scale
    second = tl.load(q + TURNING + pair, pair < TURNING, 0).to(tl.float32) * scale
    near = tl.load(centre + term * DIM + pair, paired, 0)
    far = tl.load(centre + term * DIM + TURNING + pair, paired, 0)
    still = (column >= 2 * TURNING) & (column < DIM)
    rest = tl.load(q + column, still, 0).to(tl.float32) * scale
    others = tl.load(centre + term * DIM + column, (term < ORDER) & still, 0)
    # R_m turns (near, far) by m: near cos - far sin, far cos + near sin.
    return first * near + second * far, second * near - first * far, tl.sum(rest * others, 1)


@triton.jit
def _attend_one(
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
        TERMS: tl.constexpr = triton.next_power_of_2(ORDER)
        PAIRS: tl.constexpr = triton.next_power_of_2(max(TURNING, 1))
        with_cos, with_sin, with_none = _centre_terms(
            query, centre + kv_head * ORDER * DIM, scale, ORDER, TURNING, DIM, TERMS, PAIRS, triton.next_power_of_2(DIM)
        )
        pair, term = tl.arange(0, PAIRS), tl.arange(0, TERMS)
        speeds = tl.load(frequencies + pair, pair < TURNING, 0)
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
            tl.static_assert(CENTRE_TILE % TILE == 0)
            cos, sin = turned_by(start // CENTRE_TILE * CENTRE_TILE + (CENTRE_TILE - 1) / 2, speeds)
            weights = tl.sum(with_cos * cos[None, :] + with_sin * sin[None, :], 1) + with_none
            curve = tl.load(basis + (tokens % CENTRE_TILE)[:, None] * ORDER + term[None, :], (term < ORDER)[None, :], 0)
            scores += tl.sum(curve * weights[None, :], 1)
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


@triton.jit
def _merge(
    q, out, sums, tops, starts, lengths, tables, scale, q_stride, table_stride, k_codes, v_codes, v_balance,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, V_HADAMARD: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, K_CODE_STRIDE: tl.constexpr, V_CODE_STRIDE: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of a query head's context, and its sinks, put together: its output."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    length = tl.load(lengths + sequence)
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
    mixed = tl.where(total > 0, mixed / total, 0.0)
    token = tl.load(starts + sequence).to(tl.int64)
    tl.store(out + (token * HEADS + head) * DIM + column, mixed.to(out.dtype.element_ty), inside)


def attention_decode(
    q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape, config: Config | None = None
) -> Tensor:
    """Attention where each sequence has one new token; as `Ops.attention`."""
    config = config or default(q, cache, batch, shape)
    key, value = side_of(cache, "key"), side_of(cache, "value")
    q = q if q.stride(2) == 1 and q.stride(1) == shape.head_dim else q.contiguous()
    sequences, splits = len(batch.context_lens), config.blocks["SPLITS"]
    sums = torch.empty(sequences, shape.num_heads, splits, shape.head_dim, dtype=torch.float32, device=q.device)
    tops = torch.empty(sequences, shape.num_heads, splits, 2, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    softcap = shape.softcap or 0.0
    common = {
        "q": q, "sums": sums, "tops": tops, "starts": batch.starts, "lengths": batch.lengths,
        "tables": batch.block_tables, "scale": shape.scale if softcap else shape.scale * LOG2E,
        "q_stride": q.stride(0), "table_stride": batch.block_tables.stride(0), "SINKS": cache.format.sinks,
        "BLOCK_SIZE": cache.block_size, "HEADS": shape.num_heads, "KV_HEADS": shape.num_kv_heads,
        "DIM": shape.head_dim, "WINDOW": shape.window or 0, "SOFTCAP": softcap,
    }  # fmt: skip
    sides = side_arguments(key, "k") | side_arguments(value, "v")
    _attend_one[(sequences, shape.num_heads, splits)](
        **common, **sides, **centre_arguments(key), LEAD=cache.lead, CENTRE_TILE=CENTRE_TILE, **config.options
    )
    merged = {name: sides[name] for name in _MERGED}
    _merge[(sequences, shape.num_heads)](
        **common, **merged, out=out, SPAN=SINK_SPAN, TILE=config.blocks["TILE"], SPLITS=splits, num_warps=2
    )
    return out


def default(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Config:
    """What fits most shapes."""
    return Config({"TILE": 32, "SPLITS": 2}, num_warps=4, num_stages=1)
