"""Decode attention on tensor cores, which take codes from the registers that they are unpacked in.

Codes are the left operand of both products: a tile's keys [tokens, elements] times queries, and its values [elements,
tokens] times weights. Columns of the right operand, 8 at least, are the query heads of a KV head, and each of them once
for each group of a vector that has a scale: sums of different groups stay apart until they are scaled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.attention_parts import completed, decoded_length, part_of
from kvant.kernels.triton.kv_centre import by_row, centre_terms, curves, put_terms, terms_of, tile_terms, turn_speeds
from kvant.kernels.triton.kv_tiles import capped, hadamard, steps_at, words_of
from kvant.kernels.triton.kv_words import (
    codes_at,
    excess_of,
    in_blocks,
    middle_of,
    places,
    places_of,
    scale_and_zero,
    words,
)


@triton.jit
def _place(x, PLACE: tl.constexpr, PLACES: tl.constexpr):
    """Of rows [ROWS, WIDTH * PLACES] the elements at a place: [WIDTH, ROWS]."""
    if PLACES > 1:
        x = tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])
        even, odd = tl.split(x)
        x = even if PLACE % 2 == 0 else odd
    if PLACES > 2:
        x = tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2])
        even, odd = tl.split(x)
        x = even if PLACE // 2 == 0 else odd
    return tl.trans(x)


@triton.jit
def _own_part(WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Whether words of a vector belong to a part, [WIDTH, PARTS]."""
    return (tl.arange(0, WIDTH) * PARTS // COLUMNS)[:, None] == tl.arange(0, PARTS)[None, :]


@triton.jit
def _side_by_side(x, own, PLACE: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Of queries [ROWS, SIZE] the elements at a place, as columns [WIDTH, ROWS * parts].

    They are zeros but in words' `own` parts. Also the columns' sums, and what codes that are not exact add to products.
    """
    x = _place(x, PLACE, places_of(KIND))
    apart = tl.where(own[:, None, :], x[:, :, None], 0.0)
    x = tl.reshape(apart, [x.shape[0], x.shape[1] * own.shape[1]]).to(TYPE)
    # As rounded: what is taken away is large, and what queries lose must not be multiplied with it.
    total = tl.sum(x.to(tl.float32), 0)
    return x, total, total * excess_of(KIND, PLACE, ASSEMBLY)


@triton.jit
def _dots(keys, q0, q1, q2, q3, lack, KIND: tl.constexpr, TYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """A tile's products [TILE, columns] with queries, on top of `lack`."""
    dots = tl.dot(codes_at(keys, 0, KIND, TYPE, False, ASSEMBLY), q0, lack, input_precision="ieee")
    if places_of(KIND) > 1:
        dots = tl.dot(codes_at(keys, 1, KIND, TYPE, False, ASSEMBLY), q1, dots, input_precision="ieee")
    if places_of(KIND) > 2:
        dots = tl.dot(codes_at(keys, 2, KIND, TYPE, False, ASSEMBLY), q2, dots, input_precision="ieee")
        dots = tl.dot(codes_at(keys, 3, KIND, TYPE, False, ASSEMBLY), q3, dots, input_precision="ieee")
    return dots


@triton.jit
def _added(
    x, values, weights, faded, PLACE: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """Sums [WIDTH, columns] of the elements at a place, with those of a tile's values."""
    codes = codes_at(values, PLACE, KIND, TYPE, True, ASSEMBLY)
    return tl.dot(codes, weights, x * faded[None, :], input_precision="ieee")


@triton.jit
def _whole(x0, x1, x2, x3, PLACES: tl.constexpr):
    """The elements at all places [WIDTH, ROWS] as rows [ROWS, WIDTH * PLACES]."""
    SIZE: tl.constexpr = x0.shape[0] * PLACES
    ROWS: tl.constexpr = x0.shape[1]
    x = tl.trans(x0)
    if PLACES == 2:
        x = tl.join(x, tl.trans(x1))
    elif PLACES == 4:
        x = tl.join(tl.join(x, tl.trans(x2)), tl.join(tl.trans(x1), tl.trans(x3)))
    return tl.reshape(x, [ROWS, SIZE])


@triton.jit
def _columns(x, PARTS: tl.constexpr):
    """What is known of rows [ROWS] for the columns [ROWS * PARTS]."""
    if PARTS == 1:
        return x
    else:
        return tl.reshape(tl.broadcast_to(x[:, None], [x.shape[0], PARTS]), [x.shape[0] * PARTS])


@triton.jit
def _query(
    q, held, balance, scale, KIND: tl.constexpr, HADAMARD: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Queries through the inverse of what keys go through, [ROWS, SIZE] float32; q are pointers to rows, [ROWS, 1]."""
    at = tl.arange(0, SIZE)[None, :]
    x = tl.load(q + at, held & (at < DIM), 0).to(tl.float32) * scale
    if balance is not None:
        x /= tl.load(balance + at, at < DIM, 1.0)
    return hadamard(x, ROWS, SIZE, HADAMARD) * HADAMARD**-0.5


@triton.jit
def _steps(
    meta, blocks, slots, kept, STEPS: tl.constexpr, GROUPS: tl.constexpr, STRIDE: tl.constexpr, KIND: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Scale and shift of codes less `middle_of`, each [TILE, GROUPS] float32; zeros where not `kept`.

    The shift of "words" is in steps. Anything where vectors have none of their own.
    """
    if STEPS == "none" or STEPS == "static":
        return slots, slots
    else:
        at = slots * words_of(STEPS, GROUPS) + tl.arange(0, GROUPS)[None, :]
        pointers = in_blocks(meta, blocks, STRIDE) + at
        if STEPS == "words":
            return scale_and_zero(tl.load(pointers, kept, 0), ASSEMBLY)
        else:
            step, shift = steps_at(pointers, kept, STEPS)
            return step, shift - step * middle_of(KIND)


@triton.jit
def _scored(dots, step, shift, total, STEPS: tl.constexpr, PARTS: tl.constexpr):
    """Scores [TILE, ROWS] from dots [TILE, ROWS * PARTS] with codes."""
    ROWS: tl.constexpr = dots.shape[1] // PARTS
    if STEPS == "words":
        dots = tl.reshape(dots, [dots.shape[0], ROWS, PARTS]) - tl.reshape(total, [1, ROWS, PARTS]) * shift[:, None, :]
        return tl.sum(dots * step[:, None, :], 2)
    else:
        if PARTS > 1:
            dots = tl.sum(tl.reshape(dots, [dots.shape[0], ROWS, PARTS]), 2)
            total = tl.sum(tl.reshape(total, [ROWS, PARTS]), 1)
        if STEPS == "none" or STEPS == "static":
            return dots
        else:
            return dots * step - total[None, :] * shift


@triton.jit
def _weighted(weights, step, shift, STEPS: tl.constexpr):
    """Weights [TILE, ROWS] times the groups' steps, and what these shift, [TILE, ROWS, groups or 1]."""
    if STEPS == "none" or STEPS == "static":
        return weights[:, :, None], weights[:, :, None]
    elif STEPS == "words":
        stepped = weights[:, :, None] * step[:, None, :]
        return stepped, stepped * shift[:, None, :]
    else:
        return (weights * step)[:, :, None], (weights * shift)[:, :, None]


@triton.jit
def _parts(x, PARTS: tl.constexpr):
    """Columns [TILE, ROWS * PARTS] of x [TILE, ROWS, PARTS], or 1 for the same in all parts."""
    if PARTS > 1:
        x = tl.broadcast_to(x, [x.shape[0], x.shape[1], PARTS])
    return tl.reshape(x, [x.shape[0], x.shape[1] * PARTS])


@triton.jit
def _gathered(x, shifted, own, PARTS: tl.constexpr):
    """Sums [WIDTH, ROWS * PARTS], each word's in its `own` part, less what was shifted: [WIDTH, ROWS].

    That is [ROWS, groups or 1].
    """
    x = tl.reshape(x, [x.shape[0], x.shape[1] // PARTS, PARTS]) - shifted[None, :, :]
    return tl.sum(tl.where(own[:, None, :], x, 0.0), 2)


@triton.jit(do_not_specialize=["table_stride", "least", "term_tiles"])
def attend_tiles(
    q, out, sums, tops, terms, starts, lengths, tables, scale, q_stride, table_stride, least, term_tiles,
    k_codes, k_meta, k_scale, k_balance, v_codes, v_meta, v_scale, v_balance, centre, frequencies, basis,
    K_KIND: tl.constexpr, K_STEPS: tl.constexpr, K_GROUPS: tl.constexpr, K_CODE_STRIDE: tl.constexpr,
    K_META_STRIDE: tl.constexpr, K_HADAMARD: tl.constexpr, K_TYPE: tl.constexpr,
    V_KIND: tl.constexpr, V_STEPS: tl.constexpr, V_GROUPS: tl.constexpr, V_CODE_STRIDE: tl.constexpr,
    V_META_STRIDE: tl.constexpr, V_HADAMARD: tl.constexpr, V_TYPE: tl.constexpr,
    ORDER: tl.constexpr, TURNING: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr, LEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, CENTRE_TILE: tl.constexpr, MANY_TERMS: tl.constexpr, ASSEMBLY: tl.constexpr,
    MEMBERS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Up to MEMBERS query heads of a KV head over a part of its context; ROWS, a multiple, fill the products.

    A single part, SPLITS = 1, is an output; of others sums and tops are left for `merge`. In `terms`, if there are any,
    is room for a program's terms of `term_tiles` tiles of the keys' centre.
    """
    sequence, split = tl.program_id(0), tl.program_id(2)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    head, member = tl.program_id(1) % KV_HEADS, tl.program_id(1) // KV_HEADS * MEMBERS
    length = decoded_length(starts, lengths, sequence)
    low, end, begin = part_of(length, split, least, WINDOW, SINKS, LEAD, TILE, SPLITS)
    # Where there are only sinks, a single part has them.
    if (low >= end) & ((SPLITS > 1) | (length == 0)):
        return
    # Products have 8 columns at least: vectors that have one group are cut all the same.
    K_PARTS: tl.constexpr = max(K_GROUPS, COLUMNS // ROWS)
    V_PARTS: tl.constexpr = max(V_GROUPS, COLUMNS // ROWS)
    K_PLACES: tl.constexpr = places_of(K_KIND)
    V_PLACES: tl.constexpr = places_of(V_KIND)
    K_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(DIM // K_PLACES))
    V_WIDTH: tl.constexpr = max(16, triton.next_power_of_2(DIM // V_PLACES))
    table = tables + sequence * table_stride
    row = tl.arange(0, ROWS)
    held = (row < MEMBERS) & (member + row < GROUP)
    query = q + tl.load(starts + sequence).to(tl.int64) * q_stride + (head * GROUP + member) * DIM
    balance = None if k_balance is None else k_balance + head * DIM
    x = _query(
        query + row[:, None] * DIM, held[:, None], balance, scale, K_KIND, K_HADAMARD, ROWS, DIM, K_WIDTH * K_PLACES
    )
    if K_STEPS == "static":
        x *= tl.load(k_scale + head)
    own = _own_part(K_WIDTH, DIM // K_PLACES, K_PARTS)
    q0, total_q, excess = _side_by_side(x, own, 0, K_KIND, K_TYPE, ASSEMBLY)
    q1, q2, q3 = q0, q0, q0
    if K_PLACES > 1:
        q1, more_q, more = _side_by_side(x, own, 1, K_KIND, K_TYPE, ASSEMBLY)
        total_q, excess = total_q + more_q, excess + more
    if K_PLACES > 2:
        q2, more_q, more = _side_by_side(x, own, 2, K_KIND, K_TYPE, ASSEMBLY)
        total_q, excess = total_q + more_q, excess + more
        q3, more_q, more = _side_by_side(x, own, 3, K_KIND, K_TYPE, ASSEMBLY)
        total_q, excess = total_q + more_q, excess + more
    if ORDER > 0:
        few = tl.arange(0, MEMBERS)[:, None, None]
        with_cos, with_sin, with_none = centre_terms(
            query + few * DIM, member + few < GROUP, centre + head * ORDER * DIM, scale, MEMBERS, ORDER, TURNING, DIM
        )
        speeds = turn_speeds(frequencies, TURNING)
        first_tile = tl.maximum(begin - LEAD, 0) // CENTRE_TILE
        if terms is None:
            first_terms = tile_terms(with_cos, with_sin, with_none, speeds, first_tile, CENTRE_TILE)
        else:
            # Of several heads they would fill the registers that the loop over the context needs.
            program = (sequence * tl.num_programs(1) + tl.program_id(1)) * SPLITS + split
            own_terms = terms + program.to(tl.int64) * term_tiles * (MEMBERS * 4)
            last_tile = (end - 1 - LEAD) // CENTRE_TILE
            put_terms(
                own_terms, with_cos, with_sin, with_none, speeds, first_tile, last_tile, CENTRE_TILE, MANY_TERMS
            )  # fmt: skip
            tl.debug_barrier()
            first_terms = terms_of(own_terms, 0, MEMBERS)
        old0, old1, old2, old3 = by_row(first_terms, ROWS)
        # The same for all tiles, if these are as large as the centre's.
        offsets = (begin - LEAD + tl.arange(0, TILE)[:, None]) & (CENTRE_TILE - 1)
        curve0, curve1, curve2, curve3 = curves(basis, offsets, ORDER)
    lack = tl.broadcast_to(-excess[None, :], [TILE, ROWS * K_PARTS])
    top = tl.full([ROWS], -float("inf"), tl.float32)
    # Sums that threads have of their own, until all tiles are done.
    total = tl.zeros([TILE, ROWS], tl.float32)
    shifted = tl.zeros([TILE, ROWS, V_GROUPS if V_STEPS == "words" else 1], tl.float32)
    sum0 = tl.zeros([V_WIDTH, ROWS * V_PARTS], tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    # Steps are small: their products with weights, 2^LIFT times as large as they are, are not too small for float16,
    # and not too large while a step is below 256.
    LIFT: tl.constexpr = 8 if V_STEPS != "none" and V_STEPS != "static" else 0
    for start in range(tl.where(low < end, begin, end), end, TILE):
        numbers = start + tl.arange(0, TILE)[:, None]
        kept = (numbers >= low) & (numbers < end)
        blocks, slots = places(table, start, numbers, kept, head, BLOCK_SIZE, TILE)
        column = tl.arange(0, K_WIDTH)[None, :]
        keys = words(k_codes, blocks, slots, column, kept, K_KIND, K_CODE_STRIDE, DIM, K_WIDTH, BLOCK_SIZE >= TILE)
        k_step, k_shift = _steps(k_meta, blocks, slots, kept, K_STEPS, K_GROUPS, K_META_STRIDE, K_KIND, ASSEMBLY)
        v_step, v_shift = _steps(v_meta, blocks, slots, kept, V_STEPS, V_GROUPS, V_META_STRIDE, V_KIND, ASSEMBLY)
        # Loaded as they are needed, not turned afterwards, or they would be unpacked on the wrong side of that.
        across = start + tl.arange(0, TILE)[None, :]
        inside = (across >= low) & (across < end)
        blocks, slots = places(table, start, across, inside, head, BLOCK_SIZE, TILE)
        column = tl.arange(0, V_WIDTH)[:, None]
        values = words(v_codes, blocks, slots, column, inside, V_KIND, V_CODE_STRIDE, DIM, V_WIDTH, BLOCK_SIZE >= TILE)
        dots = _dots(keys, q0, q1, q2, q3, lack, K_KIND, K_TYPE, ASSEMBLY)
        scores = _scored(dots, k_step, k_shift, total_q, K_STEPS, K_PARTS)
        if ORDER > 0:
            last = (start + TILE - 1 - LEAD) // CENTRE_TILE
            if terms is None:
                next_terms = tile_terms(with_cos, with_sin, with_none, speeds, last, CENTRE_TILE)
            else:
                next_terms = terms_of(own_terms, last - first_tile, MEMBERS)
            now0, now1, now2, now3 = by_row(next_terms, ROWS)
            if TILE < CENTRE_TILE:
                curve0, curve1, curve2, curve3 = curves(basis, (numbers - LEAD) & (CENTRE_TILE - 1), ORDER)
            if LEAD % TILE == 0:
                common = now0 * curve0 + now1 * curve1 + now2 * curve2 + now3 * curve3
            else:
                new = numbers - LEAD >= last * CENTRE_TILE
                common = tl.where(new, now0, old0) * curve0 + tl.where(new, now1, old1) * curve1
                common += tl.where(new, now2, old2) * curve2 + tl.where(new, now3, old3) * curve3
                old0, old1, old2, old3 = now0, now1, now2, now3
            scores += common
        scores = tl.where(kept, capped(scores, SOFTCAP), -float("inf"))
        next_top = tl.maximum(top, tl.max(scores, 0))
        faded = tl.exp2(top - next_top)
        weights = tl.exp2(scores - (next_top - LIFT)[None, :])
        top = next_top
        total = total * faded[None, :] + weights
        stepped, shifts = _weighted(weights, v_step, v_shift, V_STEPS)
        if V_STEPS != "none" and V_STEPS != "static":
            shifted = shifted * faded[None, :, None] + shifts
        weights = _parts(stepped.to(V_TYPE), V_PARTS)
        faded = _columns(faded, V_PARTS)
        sum0 = _added(sum0, values, weights, faded, 0, V_KIND, V_TYPE, ASSEMBLY)
        if V_PLACES > 1:
            sum1 = _added(sum1, values, weights, faded, 1, V_KIND, V_TYPE, ASSEMBLY)
        if V_PLACES > 2:
            sum2 = _added(sum2, values, weights, faded, 2, V_KIND, V_TYPE, ASSEMBLY)
            sum3 = _added(sum3, values, weights, faded, 3, V_KIND, V_TYPE, ASSEMBLY)
    factor = tl.load(v_scale + head) if V_STEPS == "static" else 2.0**-LIFT
    own = _own_part(V_WIDTH, DIM // V_PLACES, V_PARTS)
    shifts = tl.sum(shifted, 0)
    x0 = _gathered(sum0, shifts, own, V_PARTS) * factor
    x1, x2, x3 = x0, x0, x0
    if V_PLACES > 1:
        x1 = _gathered(sum1, shifts, own, V_PARTS) * factor
    if V_PLACES > 2:
        x2 = _gathered(sum2, shifts, own, V_PARTS) * factor
        x3 = _gathered(sum3, shifts, own, V_PARTS) * factor
    mixed, weight = _whole(x0, x1, x2, x3, V_PLACES), tl.sum(total, 0) * 2.0**-LIFT
    column = tl.arange(0, V_WIDTH * V_PLACES)[None, :]
    inside = held[:, None] & (column < DIM)
    if SPLITS == 1:
        found = completed(
            mixed, top, weight, query + row[:, None] * DIM, held[:, None], table, length, head, scale, k_codes,
            v_codes, v_balance, K_KIND, V_KIND, V_HADAMARD, SINKS, SPAN, BLOCK_SIZE, K_CODE_STRIDE, V_CODE_STRIDE, DIM,
            WINDOW, SOFTCAP,
        )  # fmt: skip
        token = tl.load(starts + sequence).to(tl.int64)
        to = out + (token * HEADS + head * GROUP + member + row)[:, None] * DIM + column
        tl.store(to, found.to(out.dtype.element_ty), inside)
    else:
        part = (sequence * HEADS + head * GROUP + member + row) * SPLITS + split
        tl.store(tops + part * 2, top, held)
        tl.store(tops + part * 2 + 1, weight, held)
        tl.store(sums + part.to(tl.int64)[:, None] * DIM + column, mixed, inside)
