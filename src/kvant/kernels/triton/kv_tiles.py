"""What kernels do with a tile of cached vectors: find it, load it, and know its codes and steps as numbers.

Constants in capitals are those of `kv_layout.Side`; see there for kinds and steps. All of this is inlined.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def width_of(KIND, DIM):
    """Elements of a vector's codes."""
    return DIM // 2 if KIND == "u4" else DIM


@triton.jit
def places(table, first, positions, head, LEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The blocks (int64) of a tile's tokens, and their places among the slots of all heads in a block.

    The tile begins at `first`, a multiple of TILE; positions [TILE] lie in it.
    """
    if LEAD == 0 and BLOCK_SIZE >= TILE:
        blocks = tl.load(table + first // BLOCK_SIZE) + tl.zeros([TILE], tl.int64)
    else:
        blocks = tl.load(table + (positions + LEAD) // BLOCK_SIZE)
    return blocks, head * BLOCK_SIZE + (positions + LEAD) % BLOCK_SIZE


@triton.jit
def numbers(raw, KIND: tl.constexpr, TYPE: tl.constexpr):
    """Codes of one element each as numbers of TYPE, exact in float16 and wider."""
    # Conversions of integers are slow; as the mantissa of a float16 between 1024 and 2048 a byte is one already.
    if KIND == "float":
        exact = raw
    elif KIND == "u8":
        exact = (raw.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1024
    elif KIND == "s8":
        exact = ((raw.to(tl.uint16) ^ 0x80) | 0x6400).to(tl.float16, bitcast=True) - 1152
    elif KIND == "e4m3":
        wide = raw.to(tl.uint16)  # its exponent is too small by 8 in a float16
        exact = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256
    else:
        tl.static_assert(KIND == "e5m2")
        exact = (raw.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    return exact.to(TYPE)


@triton.jit
def nibbles(raw, TYPE: tl.constexpr):
    """The low and the high 4 bits of bytes, as numbers of TYPE."""
    wide = raw.to(tl.uint16)
    low = ((wide & 15) | 0x6400).to(tl.float16, bitcast=True) - 1024
    high = ((wide >> 4) | 0x6400).to(tl.float16, bitcast=True) - 1024
    return low.to(TYPE), high.to(TYPE)


@triton.jit
def half_of(bits):
    """The float32 of float16's bits in the low half of an int32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.constexpr_function
def words_of(STEPS, GROUPS):
    """The int16s of a vector's scales and shifts."""
    return 2 if STEPS == "affine" else GROUPS


@triton.jit
def steps_at(words, kept, STEPS: tl.constexpr):
    """Scale and shift, float32, from the words at pointers (any shape): x = code * scale - shift.

    Zeros where not `kept`; None keeps all.
    """
    other = None if kept is None else 0
    shift = tl.zeros(words.shape, tl.float32)
    if STEPS == "affine":
        both = tl.load(words.to(tl.pointer_type(tl.int32)), kept, other)
        step, shift = half_of(both), -half_of(both >> 16)
    elif STEPS == "words":
        word = tl.load(words, kept, other).to(tl.int32)
        step = half_of((word & 0xFFC0) >> 1)
        shift = step * (3.5 + (word & 63).to(tl.float32) * 0.125)
    else:
        tl.static_assert(STEPS == "scale")
        step = half_of(tl.load(words, kept, other).to(tl.int32))
    return step, shift


@triton.jit
def hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of x [ROWS, WIDTH] times Sylvester's matrix in blocks of BLOCK, its elements 1 and -1."""
    at = tl.arange(0, WIDTH)[None, :] + tl.zeros([ROWS, WIDTH], tl.int32)
    for bit in tl.static_range(8):
        if (1 << bit) < BLOCK:
            other = tl.gather(x, at ^ (1 << bit), 1)
            x = other + tl.where((at & (1 << bit)) == 0, x, -x)
    return x


@triton.jit
def hadamard_of_halves(even, odd, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`hadamard` of rows whose even and odd elements come, and go, apart."""
    both, difference = even + odd, even - odd
    return hadamard(both, ROWS, WIDTH, BLOCK // 2), hadamard(difference, ROWS, WIDTH, BLOCK // 2)


@triton.jit
def shaped_query(
    q,
    held,
    balance,
    scale,
    KIND: tl.constexpr,
    HADAMARD: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Queries as a side's codes need them, float32: scaled, and through the inverse of what keys go through.

    q are pointers to rows of DIM elements, [ROWS, 1], and `held` says which of these there are; the others give zeros.
    Returns the even and the odd elements for 4-bit codes, else all elements twice, [ROWS, WIDTH]; zeros fill the rows.
    """
    at = tl.arange(0, WIDTH)[None, :]
    if KIND == "u4":
        inside = at < DIM // 2
        even = tl.load(q + 2 * at, held & inside, 0).to(tl.float32) * scale
        odd = tl.load(q + 2 * at + 1, held & inside, 0).to(tl.float32) * scale
        if balance is not None:
            even /= tl.load(balance + 2 * at, inside, 1.0)
            odd /= tl.load(balance + 2 * at + 1, inside, 1.0)
        if HADAMARD > 1:
            even, odd = hadamard_of_halves(even, odd, ROWS, WIDTH, HADAMARD)
    else:
        even = tl.load(q + at, held & (at < DIM), 0).to(tl.float32) * scale
        if balance is not None:
            even /= tl.load(balance + at, at < DIM, 1.0)
        even = hadamard(even, ROWS, WIDTH, HADAMARD)
        odd = even
    return even * HADAMARD**-0.5, odd * HADAMARD**-0.5


@triton.jit
def vectors(
    codes, meta, scale, head, blocks, slots,
    KIND: tl.constexpr, STEPS: tl.constexpr, GROUPS: tl.constexpr, CODE_STRIDE: tl.constexpr,
    META_STRIDE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TYPE: tl.constexpr, STEPPED: tl.constexpr,
):  # fmt: skip
    """A tile's vectors as their inner codec knows them, of TYPE; static scales are left out.

    Unless they are to be STEPPED, those of one group are left as codes, which are exact: see `tile_steps`.

    Returns the even and the odd elements for 4-bit codes, else all elements twice, [TILE, WIDTH]. Behind the last
    element is something finite.
    """
    STORED: tl.constexpr = DIM // 2 if KIND == "u4" else DIM
    column = tl.arange(0, WIDTH)[None, :]
    at = (blocks * CODE_STRIDE + slots * STORED)[:, None] + column
    raw = tl.load(codes + at) if WIDTH == STORED else tl.load(codes + at, column < STORED, 0)
    if KIND == "u4":
        even, odd = nibbles(raw, TYPE)
    else:
        even = numbers(raw, KIND, TYPE)
        odd = even
    if (STEPPED or GROUPS > 1) and STEPS != "none" and STEPS != "static":
        first = blocks * META_STRIDE + slots * words_of(STEPS, GROUPS)
        step, shift = steps_at(meta + first, None, STEPS)
        steps, shifts = step.to(TYPE)[:, None], shift.to(TYPE)[:, None]
        for group in tl.static_range(1, GROUPS):
            step, shift = steps_at(meta + first + group, None, STEPS)
            here = column // (STORED // GROUPS) == group
            steps = tl.where(here, step.to(TYPE)[:, None], steps)
            shifts = tl.where(here, shift.to(TYPE)[:, None], shifts)
        even, odd = even * steps - shifts, odd * steps - shifts
    return even, odd


@triton.jit
def tile_steps(
    meta, scale, head, blocks, slots,
    STEPS: tl.constexpr, GROUPS: tl.constexpr, META_STRIDE: tl.constexpr,
):  # fmt: skip
    """Scale and shift, [TILE] float32, of a tile's vectors that `vectors` has not STEPPED."""
    step, shift = tl.full(blocks.shape, 1.0, tl.float32), tl.zeros(blocks.shape, tl.float32)
    if STEPS == "static":
        step = step * tl.load(scale + head)
    elif GROUPS == 1 and STEPS != "none":
        at = blocks * META_STRIDE + slots * words_of(STEPS, GROUPS)
        step, shift = steps_at(meta + at, None, STEPS)
    return step, shift


@triton.jit
def sink_rows(codes, head, which, KIND: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPAN: tl.constexpr):
    """Where the float16 elements of sinks `which` begin: pointers of their shape."""
    width: tl.constexpr = DIM // 2 if KIND == "u4" else DIM
    return (codes + (head * BLOCK_SIZE + which * SPAN) * width).to(tl.pointer_type(tl.float16))


@triton.jit
def capped(scores, SOFTCAP: tl.constexpr):
    """Scores of base 2: soft-capped where there is a cap, and times log2(e); without one they have that already."""
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        squashed = 1 - 2 / (tl.exp2(scores * (2 * 1.4426950408889634 / SOFTCAP)) + 1)
        scores = squashed * (SOFTCAP * 1.4426950408889634)
    return scores
