"""Bringing vectors into the space that a codec stores its codes in, and back: what prefill attention does beforehand.

For 4-bit codes a vector there is its even elements, then the odd ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.kv_centre import turned_by
from kvant.kernels.triton.kv_tiles import hadamard, hadamard_of_halves, shaped_query, sink_rows, width_of


@triton.jit
def put_halves(at, even, odd, held, KIND: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Store rows of a side's space: for 4-bit codes the even elements, then the odd ones."""
    column = tl.arange(0, WIDTH)[None, :]
    tl.store(at + column, even.to(at.dtype.element_ty), held & (column < width_of(KIND, DIM)))
    if KIND == "u4":
        tl.store(at + DIM // 2 + column, odd.to(at.dtype.element_ty), held & (column < DIM // 2))


@triton.jit(do_not_specialize=["tokens"])
def shape_queries(
    q, shaped, scale, q_stride, tokens, k_balance, k_scale,
    K_KIND: tl.constexpr, K_STEPS: tl.constexpr, K_HADAMARD: tl.constexpr, ORDER: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The queries of ROWS tokens and one head, scaled, in the space of the keys' codes.

    Static scales go with the queries, or with the keys where these have a centre: see `_centred`.
    """
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    WIDTH: tl.constexpr = triton.next_power_of_2(width_of(K_KIND, DIM))
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    held = token < tokens
    balance = None if k_balance is None else k_balance + kv_head * DIM
    rows = q + token.to(tl.int64) * q_stride + head * DIM
    even, odd = shaped_query(rows, held, balance, scale, K_KIND, K_HADAMARD, ROWS, DIM, WIDTH)
    if K_STEPS == "static" and ORDER == 0:
        even *= tl.load(k_scale + kv_head)
    at = shaped + (token.to(tl.int64) * HEADS + head) * DIM
    put_halves(at, even, odd, held, K_KIND, DIM, WIDTH)


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
    put_halves(at, even * HADAMARD**-0.5, odd * HADAMARD**-0.5, held | True, KIND, DIM, WIDTH)


@triton.jit(do_not_specialize=["table_stride"])
def shape_sinks(
    sink_keys, sink_values, starts, lengths, tables, table_stride, k_codes, v_codes, k_balance, v_balance,
    K_KIND: tl.constexpr, K_CODE_STRIDE: tl.constexpr, K_HADAMARD: tl.constexpr,
    V_KIND: tl.constexpr, V_CODE_STRIDE: tl.constexpr, V_HADAMARD: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SINKS: tl.constexpr, SPAN: tl.constexpr,
    ROWS: tl.constexpr, FEWEST: tl.constexpr,
):  # fmt: skip
    """A sequence's sinks in the spaces of the codes, [ROWS, DIM] each; zeros where there is none.

    Sequences with less than FEWEST new tokens are left out.
    """
    sequence, head = tl.program_id(0), tl.program_id(1)
    if tl.load(starts + sequence + 1) - tl.load(starts + sequence) < FEWEST:
        return
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
def shape_centre(
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
    put_halves(at, even * K_HADAMARD**-0.5, odd * K_HADAMARD**-0.5, held, K_KIND, DIM, WIDTH)


@triton.jit(do_not_specialize=["tokens"])
def unshape(
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
