"""Attention of any number of new tokens a sequence over the paged cache, on tensor cores.

A tile of query rows, tokens times the query heads of one KV head, meets the context tile by tile. Vectors are met in
the space that their codec stores them in: queries are brought there once (`shape_queries`), so are the sinks
(`shape_sinks`) and the keys' centre (`shape_centre`), and the sums of values are brought back (`unshape`). Nothing
but the tile at hand is decoded. Scores have base 2.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvant.formats.kv import SINK_SPAN, KVLayer
from kvant.formats.kv_stats import CENTRE_TILE
from kvant.kernels.ops import AttentionBatch, AttentionShape
from kvant.kernels.triton.attention_parts import LOG2E
from kvant.kernels.triton.attention_spaces import shape_centre, shape_queries, shape_sinks, unshape
from kvant.kernels.triton.kv_layout import TORCH_TYPES, centre_arguments, dot_types, layer_key, side_arguments, side_of
from kvant.kernels.triton.kv_tiles import (
    capped,
    places,
    tile_steps,
    vectors,
    width_of,
)
from kvant.kernels.triton.launch import Config, interpreted

SINK_ROWS = 16  # rows of the sinks' tile: the fewest that tensor cores take


@triton.jit
def _tile_of(starts, tile, sequences, FEWEST: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr):
    """The sequence that a tile of TOKENS new tokens belongs to, and which of its tiles it is.

    Sequences with less than FEWEST new tokens have no tiles; after the last tile comes one past the last sequence.
    """
    sequence = tl.arange(0, PADDED)
    there = sequence < sequences
    count = tl.load(starts + sequence + 1, there, 0) - tl.load(starts + sequence, there, 0)
    tiles = tl.where(there & (count >= FEWEST), (count + TOKENS - 1) // TOKENS, 0)
    ends = tl.cumsum(tiles, 0)
    mine = tl.sum(tl.where(ends <= tile, 1, 0), 0)
    return mine, tile - tl.sum(tl.where(sequence < mine, tiles, 0), 0)


@triton.jit
def _halves(rows, KIND: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """What `put_halves` stored in rows, pointers [ROWS, 1]; for other than 4-bit codes all elements twice."""
    column = tl.arange(0, WIDTH)[None, :]
    even = tl.load(rows + column, column < width_of(KIND, DIM), 0)
    odd = tl.load(rows + DIM // 2 + column, column < DIM // 2, 0) if KIND == "u4" else even
    return even, odd


@triton.jit
def _centred(
    keys, high_keys, step, shift, turned, basis, offset,
    KIND: tl.constexpr, ORDER: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CENTRE_TILE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A tile's keys, times `step` less `shift`, with their centre; `offset` is the tile's in the centre's.

    The centre is its expansion, which `turned` holds in float32, times the polynomials. Tensor cores add up 16 terms at
    least: so each is high * high + low * high + high * low, and keys are as exact as they are decoded.
    """
    tl.static_assert(CENTRE_TILE % TILE == 0)
    TERMS: tl.constexpr = max(16, triton.next_power_of_2(3 * ORDER))
    TYPE: tl.constexpr = keys.dtype
    term, column = tl.arange(0, TERMS), tl.arange(0, WIDTH)[None, :]
    part, used = term // ORDER, term < 3 * ORDER
    curves = basis + (offset + tl.arange(0, TILE))[:, None] * ORDER + (term % ORDER)[None, :]
    curve = _part_of(tl.load(curves, used[None, :], 0), (part == 1)[None, :], TYPE)
    rows, inside = turned + (term % ORDER)[:, None] * DIM + column, used[:, None] & (column < width_of(KIND, DIM))
    low = (part == 2)[:, None]
    terms = _part_of(tl.load(rows, inside, 0), low, TYPE)
    exact = keys.to(tl.float32) * step[:, None] - shift[:, None]
    keys = tl.dot(curve, terms, exact, input_precision="ieee").to(TYPE)
    if KIND == "u4":
        terms = _part_of(tl.load(rows + DIM // 2, inside, 0), low, TYPE)
        exact = high_keys.to(tl.float32) * step[:, None] - shift[:, None]
        high_keys = tl.dot(curve, terms, exact, input_precision="ieee").to(TYPE)
    return keys, high_keys


@triton.jit
def _part_of(x, low, TYPE: tl.constexpr):
    """x as TYPE holds it, or, where `low`, what that leaves."""
    return tl.where(low, x - x.to(TYPE).to(tl.float32), x).to(TYPE)


@triton.jit
def _folded(
    even, odd, keys, high_keys, values, high_values, tokens, there, position, top, total, low_sum, high_sum,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, V_TYPE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Tokens added to the softmax so far of rows at `position`: if MASKED, those that are `there` and that rows see."""
    scores = tl.dot(even, tl.trans(keys), input_precision="ieee")
    if K_KIND == "u4":
        scores = tl.dot(odd, tl.trans(high_keys), scores, input_precision="ieee")
    scores = capped(scores, SOFTCAP)
    if MASKED:
        seen = (tokens[None, :] <= position[:, None]) & there[None, :]
        if WINDOW > 0:
            seen &= tokens[None, :] > position[:, None] - WINDOW
        scores = tl.where(seen, scores, -float("inf"))
    next_top = tl.maximum(top, tl.max(scores, 1))
    base = next_top
    if MASKED:
        base = tl.where(next_top == -float("inf"), 0.0, next_top)  # rows that have seen nothing yet
    kept, weights = tl.exp2(top - base), tl.exp2(scores - base[:, None])
    total = total * kept + tl.sum(weights, 1)
    weights = weights.to(V_TYPE)
    low_sum = tl.dot(weights, values, low_sum * kept[:, None], input_precision="ieee")
    if V_KIND == "u4":
        high_sum = tl.dot(weights, high_values, high_sum * kept[:, None], input_precision="ieee")
    return next_top, total, low_sum, high_sum


@triton.jit
def _met(
    even, odd, first, low, end, position, top, total, low_sum, high_sum, head, table,
    k_codes, k_meta, k_scale, v_codes, v_meta, turned, basis,
    K_KIND: tl.constexpr, K_STEPS: tl.constexpr, K_GROUPS: tl.constexpr, K_CODE_STRIDE: tl.constexpr,
    K_META_STRIDE: tl.constexpr, K_TYPE: tl.constexpr,
    V_KIND: tl.constexpr, V_STEPS: tl.constexpr, V_GROUPS: tl.constexpr, V_CODE_STRIDE: tl.constexpr,
    V_META_STRIDE: tl.constexpr, V_TYPE: tl.constexpr,
    ORDER: tl.constexpr, LEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CENTRE_TILE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The tile from token `first` on, of which tokens from low to end are there, added to the softmax so far."""
    K_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(width_of(K_KIND, DIM)))
    V_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(width_of(V_KIND, DIM)))
    tokens = first + tl.arange(0, TILE)
    nearest = tokens
    if MASKED:
        # Tokens outside are taken for the nearest inside, whose vectors are there.
        nearest = tl.minimum(tl.maximum(tokens, low), end - 1)
    blocks, slots = places(table, first, nearest, head, LEAD, BLOCK_SIZE, TILE)
    keys, high_keys = vectors(
        k_codes, k_meta, None, head, blocks, slots, K_KIND, K_STEPS, K_GROUPS, K_CODE_STRIDE, K_META_STRIDE,
        DIM, K_WIDTH, K_TYPE, ORDER == 0,
    )  # fmt: skip
    values, high_values = vectors(
        v_codes, v_meta, None, head, blocks, slots, V_KIND, V_STEPS, V_GROUPS, V_CODE_STRIDE, V_META_STRIDE,
        DIM, V_WIDTH, V_TYPE, True,
    )  # fmt: skip
    if ORDER > 0:
        step, shift = tile_steps(k_meta, k_scale, head, blocks, slots, K_STEPS, K_GROUPS, K_META_STRIDE)
        keys, high_keys = _centred(
            keys, high_keys, step, shift, turned + (first // CENTRE_TILE * KV_HEADS + head) * ORDER * DIM,
            basis, first % CENTRE_TILE, K_KIND, ORDER, DIM, K_WIDTH, CENTRE_TILE, TILE,
        )  # fmt: skip
    return _folded(
        even, odd, keys, high_keys, values, high_values, tokens, tokens == nearest, position, top, total, low_sum,
        high_sum, K_KIND, V_KIND, V_TYPE, WINDOW, SOFTCAP, MASKED,
    )  # fmt: skip


# Numbers that change from step to step are no reason to compile again.
@triton.jit(do_not_specialize=["table_stride", "tiles", "sequences"])
def _attend_rows(
    shaped, out, starts, lengths, tables, table_stride, tiles, sequences,
    k_codes, k_meta, k_scale, v_codes, v_meta, v_scale, sink_keys, sink_values, turned, basis,
    K_KIND: tl.constexpr, K_STEPS: tl.constexpr, K_GROUPS: tl.constexpr, K_CODE_STRIDE: tl.constexpr,
    K_META_STRIDE: tl.constexpr, K_TYPE: tl.constexpr,
    V_KIND: tl.constexpr, V_STEPS: tl.constexpr, V_GROUPS: tl.constexpr, V_CODE_STRIDE: tl.constexpr,
    V_META_STRIDE: tl.constexpr, V_TYPE: tl.constexpr,
    ORDER: tl.constexpr, SINKS: tl.constexpr, SINK_ROWS: tl.constexpr, LEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    CENTRE_TILE: tl.constexpr, PADDED: tl.constexpr, FEWEST: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """New tokens of one sequence, as many as ROWS holds with the query heads of one KV head, and their context."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    MEMBERS: tl.constexpr = min(GROUP, ROWS)
    TOKENS: tl.constexpr = ROWS // MEMBERS
    K_STORED: tl.constexpr = width_of(K_KIND, DIM)
    V_STORED: tl.constexpr = width_of(V_KIND, DIM)
    K_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(K_STORED))
    V_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(V_STORED))
    # The last tiles of a prompt have the longest contexts: they go first.
    sequence, tile = _tile_of(starts, tiles - 1 - tl.program_id(0), sequences, FEWEST, TOKENS, PADDED)
    head, piece = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS
    there = sequence < sequences  # else there is nothing to do: all loops are empty
    sequence, tile = tl.where(there, sequence, 0), tl.where(there, tile, 0)
    start, length = tl.load(starts + sequence, there, 0), tl.load(lengths + sequence, there, 0)
    count = tl.load(starts + sequence + 1, there, 0) - start
    row = tl.arange(0, ROWS)
    token, member = tile * TOKENS + row // MEMBERS, piece * MEMBERS + row % MEMBERS
    held = ((row // MEMBERS < TOKENS) & (token < count) & (member < GROUP))[:, None]
    position = length - count + token
    line = ((start + token).to(tl.int64) * HEADS + head * GROUP + member)[:, None] * DIM
    column, values_at = tl.arange(0, K_WIDTH)[None, :], tl.arange(0, V_WIDTH)[None, :]
    even = tl.load(shaped + line + column, held & (column < K_STORED), 0)
    odd = even
    if K_KIND == "u4":
        odd = tl.load(shaped + line + DIM // 2 + column, held & (column < K_STORED), 0)
    earliest = length - count + tile * TOKENS
    end = tl.minimum(earliest + TOKENS, length)
    low = SINKS
    if WINDOW > 0:
        low = tl.maximum(earliest - WINDOW + 1, SINKS)
    table = tables + sequence * table_stride
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    low_sum = tl.zeros([ROWS, V_WIDTH], tl.float32)
    high_sum = tl.zeros([ROWS, V_WIDTH], tl.float32)
    if SINKS > 0:
        at = ((sequence * KV_HEADS + head) * SINK_ROWS + tl.arange(0, SINK_ROWS))[:, None] * DIM
        low_keys, high_keys = _halves(sink_keys + at, K_KIND, DIM, K_WIDTH)
        low_values, high_values = _halves(sink_values + at, V_KIND, DIM, V_WIDTH)
        which = tl.arange(0, SINK_ROWS)
        top, total, low_sum, high_sum = _folded(
            even, odd, low_keys, high_keys, low_values, high_values, which, which < SINKS, position, top, total,
            low_sum, high_sum, K_KIND, V_KIND, V_TYPE, WINDOW, SOFTCAP, True,
        )  # fmt: skip
    begin = tl.where(low < end, low // TILE * TILE, end)
    # Tiles that every row sees all of come first, then those before and behind them.
    clean = low
    if WINDOW > 0:
        clean = tl.maximum(earliest + TOKENS - WINDOW, low)
    clean_end = tl.maximum((earliest + 1) // TILE * TILE, begin)
    clean = tl.minimum(tl.cdiv(clean, TILE) * TILE, clean_end)
    for first in range(clean, clean_end, TILE):
        top, total, low_sum, high_sum = _met(
            even, odd, first, low, end, position, top, total, low_sum, high_sum, head, table, k_codes, k_meta, k_scale,
            v_codes, v_meta, turned, basis, K_KIND, K_STEPS, K_GROUPS, K_CODE_STRIDE, K_META_STRIDE, K_TYPE, V_KIND,
            V_STEPS, V_GROUPS, V_CODE_STRIDE, V_META_STRIDE, V_TYPE, ORDER, LEAD, BLOCK_SIZE, KV_HEADS, DIM, WINDOW,
            SOFTCAP, CENTRE_TILE, TILE, False,
        )  # fmt: skip
    for at in range(begin, end - (clean_end - clean), TILE):
        first = tl.where(at < clean, at, at + (clean_end - clean))
        top, total, low_sum, high_sum = _met(
            even, odd, first, low, end, position, top, total, low_sum, high_sum, head, table, k_codes, k_meta, k_scale,
            v_codes, v_meta, turned, basis, K_KIND, K_STEPS, K_GROUPS, K_CODE_STRIDE, K_META_STRIDE, K_TYPE, V_KIND,
            V_STEPS, V_GROUPS, V_CODE_STRIDE, V_META_STRIDE, V_TYPE, ORDER, LEAD, BLOCK_SIZE, KV_HEADS, DIM, WINDOW,
            SOFTCAP, CENTRE_TILE, TILE, True,
        )  # fmt: skip
    factor = 1 / total
    if V_STEPS == "static":
        factor *= tl.load(v_scale + head)
    inside = held & (values_at < V_STORED)
    if V_KIND == "u4":
        tl.store(out + line + 2 * values_at, (low_sum * factor[:, None]).to(out.dtype.element_ty), inside)
        tl.store(out + line + 2 * values_at + 1, (high_sum * factor[:, None]).to(out.dtype.element_ty), inside)
    else:
        tl.store(out + line + values_at, (low_sum * factor[:, None]).to(out.dtype.element_ty), inside)


SHAPED_ROWS = 16  # tokens that the transforms take at once


def attention_prefill(
    q: Tensor,
    cache: KVLayer,
    batch: AttentionBatch,
    shape: AttentionShape,
    out: Tensor,
    config: Config | None = None,
    fewest: int = 1,
) -> None:
    """Attention of the sequences that have at least `fewest` new tokens, as `Ops.attention`, into `out`, contiguous.

    Rows of other sequences come out as anything. What is launched serves all batches of as many tokens and sequences,
    of which one more than here may have `fewest`, if that is more than one.
    """
    config = config or default(q, cache, batch, shape)
    keys, values = side_of(cache, "key"), side_of(cache, "value")
    assert not (cache.format.sinks and "static" in (keys.steps, values.steps)), "no sinks of static codes"
    sides = side_arguments(keys, "k") | side_arguments(values, "v")
    centre = centre_arguments(keys)
    k_type, v_type = dot_types(q.dtype, keys, values)
    heads = {"HEADS": shape.num_heads, "KV_HEADS": shape.num_kv_heads, "DIM": shape.head_dim}
    paging = {"BLOCK_SIZE": cache.block_size, "SINKS": cache.format.sinks}
    tables = {"lengths": batch.lengths, "tables": batch.block_tables, "table_stride": batch.block_tables.stride(0)}
    q = q if q.stride(2) == 1 and q.stride(1) == shape.head_dim else q.contiguous()
    tokens, sequences = len(q), len(batch.context_lens)
    softcap = shape.softcap or 0.0
    rows = (triton.cdiv(tokens, SHAPED_ROWS), shape.num_heads)

    def empty(dtype: torch.dtype, *size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=q.device)

    queries = empty(TORCH_TYPES[k_type], *q.shape)
    shape_queries[rows](
        q, queries, shape.scale if softcap else shape.scale * LOG2E, q.stride(0), tokens,
        **_some(sides, "k_balance", "k_scale", "K_KIND", "K_STEPS", "K_HADAMARD"), **heads, ROWS=SHAPED_ROWS,
        ORDER=keys.order,
    )  # fmt: skip
    sink_keys = sink_values = turned = None
    if cache.format.sinks:
        size = (sequences, shape.num_kv_heads, SINK_ROWS, shape.head_dim)
        sink_keys, sink_values = empty(queries.dtype, *size), empty(TORCH_TYPES[v_type], *size)
        shape_sinks[(sequences, shape.num_kv_heads)](
            sink_keys, sink_values, batch.starts, **tables, **paging, SPAN=SINK_SPAN, ROWS=SINK_ROWS, FEWEST=fewest,
            KV_HEADS=shape.num_kv_heads, DIM=shape.head_dim,
            **_some(sides, "k_codes", "v_codes", "k_balance", "v_balance", "K_KIND", "K_CODE_STRIDE", "K_HADAMARD",
                    "V_KIND", "V_CODE_STRIDE", "V_HADAMARD"),
        )  # fmt: skip
    if keys.order:
        count = triton.cdiv(max(batch.context_lens), CENTRE_TILE)
        turned = empty(torch.float32, count, shape.num_kv_heads, keys.order, shape.head_dim)
        shape_centre[(count, shape.num_kv_heads)](
            turned, **_some(centre, "centre", "frequencies", "ORDER", "TURNING"),
            **_some(sides, "k_balance", "K_KIND", "K_HADAMARD"), KV_HEADS=shape.num_kv_heads, DIM=shape.head_dim,
            CENTRE_TILE=CENTRE_TILE, TERMS=triton.next_power_of_2(keys.order),
        )  # fmt: skip
    group = shape.num_heads // shape.num_kv_heads
    members = min(group, config.blocks["ROWS"])
    held = config.blocks["ROWS"] // members
    counts = [stop - start for start, stop in pairwise(batch.query_starts)]
    # However the tokens are distributed, each sequence but one adds at most one to the tiles of all in a row.
    tiles = triton.cdiv(tokens, held) + sum(count >= fewest for count in counts)
    sums = empty(torch.float32, *q.shape) if values.hadamard > 1 else out
    _attend_rows[(tiles, shape.num_kv_heads * triton.cdiv(group, members))](
        queries, sums, batch.starts, **tables, tiles=tiles, sink_keys=sink_keys, sink_values=sink_values,
        turned=turned, **_some(centre, "basis", "ORDER"), **paging, **heads, LEAD=cache.lead, SINK_ROWS=SINK_ROWS,
        **_some(sides, "k_codes", "k_meta", "k_scale", "v_codes", "v_meta", "v_scale", "K_KIND", "K_STEPS", "K_GROUPS",
                "K_CODE_STRIDE", "K_META_STRIDE", "V_KIND", "V_STEPS", "V_GROUPS", "V_CODE_STRIDE", "V_META_STRIDE"),
        K_TYPE=k_type, V_TYPE=v_type, WINDOW=shape.window or 0, SOFTCAP=softcap, CENTRE_TILE=CENTRE_TILE,
        sequences=sequences, PADDED=max(16, triton.next_power_of_2(sequences)), FEWEST=fewest, **config.options,
    )  # fmt: skip
    if values.hadamard > 1:
        unshape[rows](sums, out, tokens, **_some(sides, "v_balance", "V_HADAMARD"), **heads, ROWS=SHAPED_ROWS)


def key(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> str:
    """What the best configuration depends on: the layer, the longest chunk and context by powers of two."""
    sizes = (_longest(batch), max(batch.context_lens))
    return "t{} c{} ".format(*map(triton.next_power_of_2, sizes)) + layer_key(q, cache, shape)


def default(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Config:
    """A good guess for data-center GPUs of compute capability 8.0 and 9.0."""
    rows = _longest(batch) * shape.num_heads // shape.num_kv_heads
    wide = triton.next_power_of_2(shape.head_dim) > 128 or q.dtype == torch.float32
    # Where operands lie in registers too, there are not enough of them for 128 rows, or for 64 with 4 warps; nor for 64
    # wide ones.
    roomy = _has_warp_groups()
    most = 128 if roomy and not wide else 64 if roomy or not wide else 32
    size = min(max(triton.next_power_of_2(rows), 16), most)
    return Config({"ROWS": size, "TILE": 32 if wide else 64}, 8 if size == 128 or wide or not roomy else 4, 2)


def candidates(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> list[Config]:
    """What may be the fastest."""
    return [
        Config({"ROWS": rows, "TILE": tile}, warps, stages)
        for rows, warps in ((128, 8), (128, 4), (64, 8), (64, 4), (32, 4))
        for tile in (32, 64)
        for stages in (2, 3)
    ]


def _longest(batch: AttentionBatch) -> int:
    return max(stop - start for start, stop in pairwise(batch.query_starts))


def _has_warp_groups() -> bool:
    """Whether tensor cores read their operands from shared memory, as since compute capability 9.0."""
    return interpreted() or int(triton.runtime.driver.active.get_current_target().arch) >= 90


def _some(arguments: dict[str, object], *names: str) -> dict[str, object]:
    return {name: arguments[name] for name in names}
