"""What a query makes of the keys' centre: see `kvant.formats.kv_stats.Centre`.

q^T R_m C_j is, for every pair that turns, a sum of two products, one with the cosine of m's angle and one with its
sine. The products are a query's once and for all; a tile of the context has its own cosines and sines.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def pairs_of(TURNING):
    """The pairs that turn, and as many more as products on tensor cores need."""
    return max(16, triton.next_power_of_2(TURNING))


@triton.jit
def centre_terms(
    q, held, centre, scale, ROWS: tl.constexpr, ORDER: tl.constexpr, TURNING: tl.constexpr, DIM: tl.constexpr
):
    """Queries' products with a head's coefficients: those that go with cosines, with sines, and with neither.

    q are pointers to rows of DIM elements, [ROWS, 1, 1]; `held` says which there are. Returns two
    [ROWS, terms, pairs] and one [ROWS, terms], float32.
    """
    TERMS: tl.constexpr = 4
    tl.static_assert(ORDER <= TERMS)
    PAIRS: tl.constexpr = pairs_of(TURNING)
    term, pair = tl.arange(0, TERMS)[None, :, None], tl.arange(0, PAIRS)[None, None, :]
    column = tl.arange(0, triton.next_power_of_2(DIM))[None, None, :]
    turning, still = pair < TURNING, (column >= 2 * TURNING) & (column < DIM)
    first = tl.load(q + pair, held & turning, 0).to(tl.float32) * scale
    second = tl.load(q + TURNING + pair, held & turning, 0).to(tl.float32) * scale
    near = tl.load(centre + term * DIM + pair, (term < ORDER) & turning, 0)
    far = tl.load(centre + term * DIM + TURNING + pair, (term < ORDER) & turning, 0)
    rest = tl.load(q + column, held & still, 0).to(tl.float32) * scale
    others = tl.load(centre + term * DIM + column, (term < ORDER) & still, 0)
    # R_m turns (near, far) by m: near cos - far sin, far cos + near sin.
    return first * near + second * far, second * near - first * far, tl.sum(rest * others, 2)


@triton.jit
def turn_speeds(frequencies, TURNING: tl.constexpr):
    """Turns per position of the pairs, float64, zeros behind the last."""
    pair = tl.arange(0, pairs_of(TURNING))
    return tl.load(frequencies + pair, pair < TURNING, 0).to(tl.float64) * 0.15915494309189535


@triton.jit
def turned_by(position, speeds):
    """Cosines and sines, float32, of the angles at a position (float32 holds it) of pairs with these `turn_speeds`."""
    # In float32 the angle of a fast pair far into a text would be good to a few digits only.
    turns = speeds * position
    part = (turns - tl.floor(turns + 0.5)).to(tl.float32)
    # The nearest quarter of a turn, and what is left, at most an eighth: short series do for that.
    quarter = (part * 4 + 12582912.0) - 12582912.0
    x = (part - quarter * 0.25) * 6.283185307179586
    square = x * x
    sine = x * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    which = quarter.to(tl.int32)
    swapped = (which & 1) != 0
    cos, sin = tl.where(swapped, sine, cosine), tl.where(swapped, cosine, sine)
    return tl.where(((which + 1) & 2) != 0, -cos, cos), tl.where((which & 2) != 0, -sin, sin)


@triton.jit
def tile_terms(with_cos, with_sin, with_none, speeds, tile, CENTRE_TILE: tl.constexpr):
    """What `centre_terms` make of a tile of the centre's: factors [ROWS, terms] of the `curve`s."""
    cos, sin = turned_by(tile * CENTRE_TILE + (CENTRE_TILE - 1) / 2, speeds)
    return tl.sum(with_cos * cos[None, None, :] + with_sin * sin[None, None, :], 2) + with_none


@triton.jit
def put_terms(at, with_cos, with_sin, with_none, speeds, first, last, CENTRE_TILE: tl.constexpr, MANY: tl.constexpr):
    """Leave the `tile_terms` of tiles [first, last] at pointer `at`, [tiles, ROWS, 4] float32.

    If they are MANY, 16 tiles at a time: as one product of their cosines and sines with the queries' terms.
    """
    COLUMNS: tl.constexpr = with_none.shape[0] * with_none.shape[1]
    column = tl.arange(0, COLUMNS)
    none = tl.reshape(with_none, [1, COLUMNS])
    if MANY:
        TILES: tl.constexpr = 16
        right_cos = tl.trans(tl.reshape(with_cos, [COLUMNS, with_cos.shape[2]]))
        right_sin = tl.trans(tl.reshape(with_sin, [COLUMNS, with_sin.shape[2]]))
        for start in tl.range(first, last + 1, TILES, num_stages=1):
            tile = start + tl.arange(0, TILES)
            middles = tile.to(tl.float64) * CENTRE_TILE + (CENTRE_TILE - 1) / 2
            cos, sin = turned_by(middles[:, None], speeds[None, :])
            terms = tl.dot(cos, right_cos, tl.broadcast_to(none, [TILES, COLUMNS]), input_precision="tf32x3")
            terms = tl.dot(sin, right_sin, terms, input_precision="tf32x3")
            to = at + (tile - first)[:, None] * COLUMNS + column[None, :]
            tl.store(to, terms, (tile <= last)[:, None])
    else:
        for tile in tl.range(first, last + 1, num_stages=1):
            terms = tile_terms(with_cos, with_sin, with_none, speeds, tile, CENTRE_TILE)
            tl.store(at + (tile - first) * COLUMNS + column, tl.reshape(terms, [COLUMNS]))


@triton.jit
def terms_of(at, tile, MEMBERS: tl.constexpr):
    """The first MEMBERS heads' terms of a tile [MEMBERS, 4], as `put_terms` left them of as many heads."""
    return tl.load(at + (tile * MEMBERS + tl.arange(0, MEMBERS)[:, None]) * 4 + tl.arange(0, 4)[None, :])


@triton.jit
def by_row(terms, ROWS: tl.constexpr):
    """The `tile_terms` [FEW, 4] of as many heads again and again: four [1, ROWS]."""
    FEW: tl.constexpr = terms.shape[0]
    even, odd = tl.split(tl.reshape(terms, [FEW, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return _again(first, ROWS), _again(second, ROWS), _again(third, ROWS), _again(fourth, ROWS)


@triton.jit
def _again(x, ROWS: tl.constexpr):
    FEW: tl.constexpr = x.shape[0]
    return tl.reshape(tl.broadcast_to(x[None, :], [ROWS // FEW, FEW]), [1, ROWS])


@triton.jit
def curves(basis, offsets, ORDER: tl.constexpr):
    """The four polynomials at offsets within a tile, zeros behind the last."""
    at, there = basis + offsets * ORDER, offsets >= 0
    first, second = tl.load(at), tl.load(at + 1, there & (ORDER > 1), 0)
    return first, second, tl.load(at + 2, there & (ORDER > 2), 0), tl.load(at + 3, there & (ORDER > 3), 0)
