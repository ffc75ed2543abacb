"""Attention of any number of new tokens a sequence over the paged cache, on tensor cores.

A tile of query rows, tokens times the query heads of one KV head, meets the context tile by tile. Vectors are met in
the space that their codec stores them in: queries are brought there once (`_shape_queries`), so are the sinks
(`_shape_sinks`) and the keys' centre (`_shape_centre`), and the sums of values are brought back (`_unshape`). Nothing
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
from kvant.kernels.triton.kv_centre import turned_by
from kvant.kernels.triton.kv_layout import TORCH_TYPES, centre_arguments, dot_types, side_arguments, side_of
from kvant.kernels.triton.kv_tiles import (
    capped,
    hadamard,
    hadamard_of_halves,
    places,
    shaped_query,
    sink_rows,
    vectors,
    width_of,
)
from kvant.kernels.triton.launch import Config

SINK_ROWS = 16  # rows of the sinks' tile: the fewest that tensor cores take


@triton.jit
def _put_halves(at, even, odd, held, KIND: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store rows of a side's space: for 4-bit codes the even elements, then the odd ones."""
    column = tl.arange(0, WIDTH)[None, :]
    tl.store(at + column, even.to(at.dtype.element_ty), held & (column < width_of(KIND, DIM)))
    if KIND == "u4":
        tl.store(at + DIM // 2 + column, odd.to(at.dtype.element_ty), held & (column < DIM // 2))


@triton.jit
def _shape_queries(
    q, shaped, scale, q_stride, tokens, k_balance, k_scale,
    K_KIND: tl.constexpr, K_STEPS: tl.constexpr, K_HADAMARD: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The queries of ROWS tokens and one head, scaled, in the space of the keys' codes."""
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    WIDTH: tl.constexpr = triton.next_power_of_2(width_of(K_KIND, DIM))
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    held = token < tokens
    balance = None if k_balance is None else k_balance + kv_head * DIM
    rows = q + token.to(tl.int64) * q_stride + head * DIM
    even, odd = shaped_query(rows, held, balance, scale, K_KIND, K_HADAMARD, ROWS, DIM, WIDTH)
    if K_STEPS == "static":
        even *= tl.load(k_scale + kv_head)
    at = shaped + (token.to(tl.int64) * HEADS + head) * DIM
    _put_halves(at, even, odd, held, K_KIND, DIM, WIDTH)


@triton.jit
def _spread_into(
    x, at, held, balance, KIND: tl.constexpr, HADAMARD: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr
):
    """Put vectors, pointers x [ROWS, 1] to float16, to `at` in a side's space; zeros for what is not held."""
    WIDTH: tl.constexpr = triton.next_power_of_2(width_of(KIND, DIM))
    column = tl.arange(0, WIDTH)[None, :]
    if KIND == "u4":
        inside = column < DIM // 2
        even = tl.load(x + 2 * column, held & inside, 0).to(tl.float32)
        odd = tl.load(x + 2 * column + 1, held & inside, 0).to(tl.float32)
        if balance is not None:
            even *= tl.load(balance + 2 * column, inside, 1.0)
            odd *= tl.load(balance + 2 * column + 1, inside, 1.0)
        if HADAMARD > 1:
            even, odd = hadamard_of_halves(even, odd, ROWS, WIDTH, HADAMARD)
    else:
        even = tl.load(x + column, held & (column < DIM), 0).to(tl.float32)
        if balance is not None:
            even *= tl.load(balance + column, column < DIM, 1.0)
        even = hadamard(even, ROWS, WIDTH, HADAMARD)
        odd = even
    _put_halves(at, even * HADAMARD**-0.5, odd * HADAMARD**-0.5, held | True, KIND, DIM, WIDTH)


@triton.jit
def _shape_sinks(
    sink_keys, sink_values, lengths, tables, table_stride, k_codes, v_codes, k_balance, v_balance,
    K_KIND: tl.constexpr, K_CODE_STRIDE: tl.constexpr, K_HADAMARD: tl.constexpr,
    V_KIND: tl.constexpr, V_CODE_STRIDE: tl.constexpr, V_HADAMARD: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A sequence's sinks in the spaces of the codes, [ROWS, DIM] each; zeros where there is none."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(tables + sequence * table_stride)
    which = tl.arange(0, ROWS)[:, None]
    there = which < tl.minimum(SINKS, tl.load(lengths + sequence))
    to = ((sequence * KV_HEADS + head) * ROWS + which) * DIM
    keys = sink_rows(k_codes + block * K_CODE_STRIDE, head, which, K_KIND, DIM, BLOCK_SIZE, SPAN)
    values = sink_rows(v_codes + block * V_CODE_STRIDE, head, which, V_KIND, DIM, BLOCK_SIZE, SPAN)
    balance = None if k_balance is None else k_balance + head * DIM
    _spread_into(keys, sink_keys + to, there, balance, K_KIND, K_HADAMARD, ROWS, DIM)
    balance = None if v_balance is None else v_balance + head * DIM
    _spread_into(values, sink_values + to, there, balance, V_KIND, V_HADAMARD, ROWS, DIM)


@triton.jit
def _turned(rows, held, element, frequencies, middle, balance, TURNING: tl.constexpr, DIM: tl.constexpr):
    """Elements [1, WIDTH] of coefficients, pointers to rows [TERMS, 1], turned to a position and balanced."""
    inside = held & (element < DIM)
    x = tl.load(rows + element, inside, 0)
    if TURNING > 0:
        paired, first = element < 2 * TURNING, element < TURNING
        other = tl.load(rows + tl.where(first, element + TURNING, element - TURNING), inside & paired, 0)
        speeds = tl.load(frequencies + element % TURNING, paired, 0).to(tl.float64) * 0.15915494309189535
        cos, sin = turned_by(middle, speeds)
        x = x * cos + tl.where(first, -other, other) * sin
    if balance is not None:
        x *= tl.load(balance + element, element < DIM, 1.0)
    return x


@triton.jit
def _shape_centre(
    shaped, centre, frequencies, k_balance,
    K_KIND: tl.constexpr, K_HADAMARD: tl.constexpr, ORDER: tl.constexpr, TURNING: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, CENTRE_TILE: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """A tile's expansion of the centre, turned to its middle, in the space of the keys' codes: [TERMS, DIM]."""
    tile, head = tl.program_id(0), tl.program_id(1)
    WIDTH: tl.constexpr = triton.next_power_of_2(width_of(K_KIND, DIM))
    term, column = tl.arange(0, TERMS)[:, None], tl.arange(0, WIDTH)[None, :]
    rows, held = centre + (head * ORDER + term) * DIM, term < ORDER
    middle = tile * CENTRE_TILE + (CENTRE_TILE - 1) / 2
    balance = None if k_balance is None else k_balance + head * DIM
    if K_KIND == "u4":
        even = _turned(rows, held, 2 * column, frequencies, middle, balance, TURNING, DIM)
        odd = _turned(rows, held, 2 * column + 1, frequencies, middle, balance, TURNING, DIM)
        even, odd = hadamard_of_halves(even, odd, TERMS, WIDTH, K_HADAMARD)
    else:
        even = hadamard(
            _turned(rows, held, column, frequencies, middle, balance, TURNING, DIM), TERMS, WIDTH, K_HADAMARD
        )
        odd = even
    at = shaped + ((tile * KV_HEADS + head) * ORDER + term) * DIM
    _put_halves(at, even * K_HADAMARD**-0.5, odd * K_HADAMARD**-0.5, held, K_KIND, DIM, WIDTH)


@triton.jit
def _tile_of(starts, tile, FEWEST: tl.constexpr, TOKENS: tl.constexpr, SEQUENCES: tl.constexpr, PADDED: tl.constexpr):
    """The sequence that a tile of TOKENS new tokens belongs to, and which of its tiles it is.

    Sequences with less than FEWEST new tokens have no tiles.
    """
    sequence = tl.arange(0, PADDED)
    there = sequence < SEQUENCES
    count = tl.load(starts + sequence + 1, there, 0) - tl.load(starts + sequence, there, 0)
    tiles = tl.where(there & (count >= FEWEST), (count + TOKENS - 1) // TOKENS, 0)
    ends = tl.cumsum(tiles, 0)
    mine = tl.sum(tl.where(ends <= tile, 1, 0), 0)
    return mine, tile - tl.sum(tl.where(sequence < mine, tiles, 0), 0)


@triton.jit
def _halves(rows, KIND: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """What `_put_halves` stored in rows, pointers [ROWS, 1]; for other than 4-bit codes all elements twice."""
    column = tl.arange(0, WIDTH)[None, :]
    even = tl.load(rows + column, column < width_of(KIND, DIM), 0)
    odd = tl.load(rows + DIM // 2 + column, column < DIM // 2, 0) if KIND == "u4" else even
    return even, odd


@triton.jit
def _centred(
    keys, high_keys, turned, basis, offset,
    KIND: tl.constexpr, ORDER: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, CENTRE_TILE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A tile's keys with their centre, whose expansion `turned` holds; the tile is at `offset` in the centre's."""
    tl.static_assert(CENTRE_TILE % TILE == 0)
    TERMS: tl.constexpr = max(16, triton.next_power_of_2(ORDER))
    TYPE: tl.constexpr = keys.dtype
    term, column = tl.arange(0, TERMS), tl.arange(0, WIDTH)[None, :]
    curves = basis + (offset + tl.arange(0, TILE))[:, None] * ORDER + term[None, :]
    curve = tl.load(curves, (term < ORDER)[None, :], 0).to(TYPE)
    rows, inside = turned + term[:, None] * DIM + column, (term < ORDER)[:, None] & (column < width_of(KIND, DIM))
    keys = tl.dot(curve, tl.load(rows, inside, 0), keys.to(tl.float32), input_precision="ieee").to(TYPE)
    if KIND == "u4":
        terms = tl.load(rows + DIM // 2, inside, 0)
        high_keys = tl.dot(curve, terms, high_keys.to(tl.float32), input_precision="ieee").to(TYPE)
    return keys, high_keys


@triton.jit
def _folded(
    even, odd, keys, high_keys, values, high_values, tokens, there, position, top, total, low_sum, high_sum,
    K_KIND: tl.constexpr, V_KIND: tl.constexpr, V_TYPE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Tokens, those that are `there`, added to the softmax so far of rows at `position`."""
    scores = tl.dot(even, tl.trans(keys), input_precision="ieee")
    if K_KIND == "u4":
        scores = tl.dot(odd, tl.trans(high_keys), scores, input_precision="ieee")
    seen = (tokens[None, :] <= position[:, None]) & there[None, :]
    if WINDOW > 0:
        seen &= tokens[None, :] > position[:, None] - WINDOW
    scores = tl.where(seen, capped(scores, SOFTCAP), -float("inf"))
    next_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(next_top == -float("inf"), 0.0, next_top)  # rows that have seen nothing yet
    kept, weights = tl.exp2(top - base), tl.exp2(scores - base[:, None])
    total = total * kept + tl.sum(weights, 1)
    weights = weights.to(V_TYPE)
    low_sum = tl.dot(weights, values, low_sum * kept[:, None], input_precision="ieee")
    if V_KIND == "u4":
        high_sum = tl.dot(weights, high_values, high_sum * kept[:, None], input_precision="ieee")
    return next_top, total, low_sum, high_sum


@triton.jit
def _attend_rows(
    shaped, out, starts, lengths, tables, table_stride, tiles,
    k_codes, k_meta, v_codes, v_meta, v_scale, sink_keys, sink_values, turned, basis,
    K_KIND: tl.constexpr, K_STEPS: tl.constexpr, K_GROUPS: tl.constexpr, K_CODE_STRIDE: tl.constexpr,
    K_META_STRIDE: tl.constexpr, K_TYPE: tl.constexpr,
    V_KIND: tl.constexpr, V_STEPS: tl.constexpr, V_GROUPS: tl.constexpr, V_CODE_STRIDE: tl.constexpr,
    V_META_STRIDE: tl.constexpr, V_TYPE: tl.constexpr,
    ORDER: tl.constexpr, SINKS: tl.constexpr, SINK_ROWS: tl.constexpr, LEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    CENTRE_TILE: tl.constexpr, SEQUENCES: tl.constexpr, FEWEST: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
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
    sequence, tile = _tile_of(
        starts, tiles - 1 - tl.program_id(0), FEWEST, TOKENS, SEQUENCES, triton.next_power_of_2(SEQUENCES)
    )
    head, piece = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS
    start, length = tl.load(starts + sequence), tl.load(lengths + sequence)
    count = tl.load(starts + sequence + 1) - start
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
            low_sum, high_sum, K_KIND, V_KIND, V_TYPE, WINDOW, SOFTCAP,
        )  # fmt: skip
    begin = tl.where(low < end, low // TILE * TILE, end)
    for first in range(begin, end, TILE):
        tokens = first + tl.arange(0, TILE)
        # Tokens outside are taken for the nearest inside, whose vectors are there.
        nearest = tl.minimum(tl.maximum(tokens, low), end - 1)
        blocks, slots = places(table, first, nearest, head, LEAD, BLOCK_SIZE, TILE)
        tile_keys, tile_high_keys = vectors(
            k_codes, k_meta, None, head, blocks, slots, K_KIND, K_STEPS, K_GROUPS, K_CODE_STRIDE, K_META_STRIDE,
            DIM, K_WIDTH, K_TYPE,
        )  # fmt: skip
        tile_values, tile_high_values = vectors(
            v_codes, v_meta, None, head, blocks, slots, V_KIND, V_STEPS, V_GROUPS, V_CODE_STRIDE, V_META_STRIDE,
            DIM, V_WIDTH, V_TYPE,
        )  # fmt: skip
        if ORDER > 0:
            tile_keys, tile_high_keys = _centred(
                tile_keys, tile_high_keys, turned + (first // CENTRE_TILE * KV_HEADS + head) * ORDER * DIM, basis,
                first % CENTRE_TILE, K_KIND, ORDER, DIM, K_WIDTH, CENTRE_TILE, TILE,
            )  # fmt: skip
        top, total, low_sum, high_sum = _folded(
            even, odd, tile_keys, tile_high_keys, tile_values, tile_high_values, tokens, tokens == nearest, position,
            top, total, low_sum, high_sum, K_KIND, V_KIND, V_TYPE, WINDOW, SOFTCAP,
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


@triton.jit
def _unshape(
    sums, out, tokens, v_balance,
    V_HADAMARD: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mixed values of ROWS tokens and one head out of the space of the values' codes."""
    head = tl.program_id(1)
    WIDTH: tl.constexpr = triton.next_power_of_2(DIM)
    token, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at, inside = (token.to(tl.int64) * HEADS + head) * DIM + column, (token < tokens) & (column < DIM)
    x = hadamard(tl.load(sums + at, inside, 0), ROWS, WIDTH, V_HADAMARD) * V_HADAMARD**-0.5
    if v_balance is not None:
        x /= tl.load(v_balance + head // (HEADS // KV_HEADS) * DIM + column, column < DIM, 1.0)
    tl.store(out + at, x.to(out.dtype.element_ty), inside)


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

    Rows of other sequences come out as anything.
    """
    config = config or default(q, cache, batch, shape)
    key, value = side_of(cache, "key"), side_of(cache, "value")
    sides = side_arguments(key, "k") | side_arguments(value, "v")
    centre = centre_arguments(key)
    k_type, v_type = dot_types(q.dtype, key, value)
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
    _shape_queries[rows](
        q, queries, shape.scale if softcap else shape.scale * LOG2E, q.stride(0), tokens,
        **_some(sides, "k_balance", "k_scale", "K_KIND", "K_STEPS", "K_HADAMARD"), **heads, ROWS=SHAPED_ROWS,
    )  # fmt: skip
    sink_keys = sink_values = turned = None
    if cache.format.sinks:
        size = (sequences, shape.num_kv_heads, SINK_ROWS, shape.head_dim)
        sink_keys, sink_values = empty(queries.dtype, *size), empty(TORCH_TYPES[v_type], *size)
        _shape_sinks[(sequences, shape.num_kv_heads)](
            sink_keys, sink_values, **tables, **paging, SPAN=SINK_SPAN, ROWS=SINK_ROWS, KV_HEADS=shape.num_kv_heads,
            DIM=shape.head_dim,
            **_some(sides, "k_codes", "v_codes", "k_balance", "v_balance", "K_KIND", "K_CODE_STRIDE", "K_HADAMARD",
                    "V_KIND", "V_CODE_STRIDE", "V_HADAMARD"),
        )  # fmt: skip
    if key.order:
        count = triton.cdiv(max(batch.context_lens), CENTRE_TILE)
        turned = empty(queries.dtype, count, shape.num_kv_heads, key.order, shape.head_dim)
        _shape_centre[(count, shape.num_kv_heads)](
            turned, **_some(centre, "centre", "frequencies", "ORDER", "TURNING"),
            **_some(sides, "k_balance", "K_KIND", "K_HADAMARD"), KV_HEADS=shape.num_kv_heads, DIM=shape.head_dim,
            CENTRE_TILE=CENTRE_TILE, TERMS=triton.next_power_of_2(key.order),
        )  # fmt: skip
    group = shape.num_heads // shape.num_kv_heads
    members = min(group, config.blocks["ROWS"])
    held = config.blocks["ROWS"] // members
    counts = [stop - start for start, stop in pairwise(batch.query_starts)]
    tiles = sum(triton.cdiv(count, held) for count in counts if count >= fewest)
    sums = empty(torch.float32, *q.shape) if value.hadamard > 1 else out
    _attend_rows[(tiles, shape.num_kv_heads * triton.cdiv(group, members))](
        queries, sums, batch.starts, **tables, tiles=tiles, sink_keys=sink_keys, sink_values=sink_values,
        turned=turned, **_some(centre, "basis", "ORDER"), **paging, **heads, LEAD=cache.lead, SINK_ROWS=SINK_ROWS,
        **_some(sides, "k_codes", "k_meta", "v_codes", "v_meta", "v_scale", "K_KIND", "K_STEPS", "K_GROUPS",
                "K_CODE_STRIDE", "K_META_STRIDE", "V_KIND", "V_STEPS", "V_GROUPS", "V_CODE_STRIDE", "V_META_STRIDE"),
        K_TYPE=k_type, V_TYPE=v_type, WINDOW=shape.window or 0, SOFTCAP=softcap, CENTRE_TILE=CENTRE_TILE,
        SEQUENCES=sequences, FEWEST=fewest, **config.options,
    )  # fmt: skip
    if value.hadamard > 1:
        _unshape[rows](sums, out, tokens, **_some(sides, "v_balance", "V_HADAMARD"), **heads, ROWS=SHAPED_ROWS)


def default(q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Config:
    """What fits most shapes."""
    return Config({"ROWS": 16, "TILE": 32}, num_warps=4, num_stages=2)


def _some(arguments: dict[str, object], *names: str) -> dict[str, object]:
    return {name: arguments[name] for name in names}
