"""What is written in the words of `weights.SpanCodes`, as kernels read it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def codes_less(words, zero, PLACE: tl.constexpr, TYPE: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The codes at a place in words [rows, n], each less its row's zero [rows] float32: in TYPE, which holds them.

    With ASSEMBLY two at a time, for a TYPE of 16 bits: a code is set in the fraction of a power of two, from which the
    power and the zero are taken away.
    """
    if ASSEMBLY:
        CODE: tl.constexpr = unpacking(PLACE, TYPE, BITS)
        less = (power(PLACE, TYPE, BITS) - zero).to(TYPE)
        found = tl.inline_asm_elementwise(
            CODE, "=r,r,r", [words, less[:, None]], dtype=less.dtype, is_pure=True, pack=2
        )
    else:
        codes = ((words >> (BITS * PLACE)) & ((1 << BITS) - 1)).to(tl.float32)
        found = (codes - zero[:, None]).to(TYPE)
    return found


@triton.jit
def values(
    words, zero, scale, bias, PLACE: tl.constexpr, TYPE: tl.constexpr, BITS: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """The values at a place: `codes_less`, times the row's scale, plus its bias, both [rows] float32: in TYPE.

    With ASSEMBLY scale and bias are rounded to TYPE too.
    """
    if ASSEMBLY:
        CODE: tl.constexpr = unpacking(PLACE, TYPE, BITS, True)
        less = (power(PLACE, TYPE, BITS) - zero).to(TYPE)
        operands = [words, less[:, None], scale.to(TYPE)[:, None], bias.to(TYPE)[:, None]]
        found = tl.inline_asm_elementwise(CODE, "=r,r,r,r,r", operands, dtype=less.dtype, is_pure=True, pack=2)
    else:
        codes = codes_less(words, zero, PLACE, tl.float32, BITS, False)
        found = (codes * scale[:, None] + bias[:, None]).to(TYPE)
    return found


@triton.constexpr_function
def unpacking(PLACE, TYPE, BITS, SCALED=False):
    """PTX for two words $1: $0 is their codes at a place plus $2, and where SCALED that times $3 plus $4."""
    kind = "f16x2" if TYPE == tl.float16 else "bf16x2"  # noqa: SIM300
    shift = BITS * PLACE
    if TYPE == tl.float16:  # noqa: SIM300
        # A fraction of 10 bits also holds a code above another: left there, without a shift, it counts 16 times.
        high = BITS == 4 and PLACE % 2 == 1
        mask, step = (0x00F000F0, 0x2C002C00) if high else (0x000F000F if BITS == 4 else 0x00FF00FF, 0x3C003C00)
        code = f"shr.u32 t, $1, {shift - 4 * high}; lop3.b32 t, t, {mask}, 0x64006400, 0xEA;"
    elif BITS == 4:
        step = 0x3F803F80
        code = f"shr.u32 t, $1, {shift}; lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA;"
    else:
        # Bfloat16's fraction has 7 bits: the code's highest bit makes the power that is taken away 128 and not 256.
        step = 0x3F803F80
        code = f"""mov.b32 less, 0xBF80BF80; shr.u32 t, $1, {shift}; lop3.b32 u, t, 0x00800080, 0x43804380, 0x6A;
            lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA; fma.rn.bf16x2 t, u, less, t;"""
    end = f"fma.rn.{kind} t, t, step, $2; fma.rn.{kind} $0, t, $3, $4;" if SCALED else f"fma.rn.{kind} $0, t, step, $2;"
    return f"{{ .reg .b32 t, u, step, less; mov.b32 step, {step}; {code} {end} }}"


@triton.constexpr_function
def power(PLACE, TYPE, BITS):
    """What `unpacking` finds added to codes, negated."""
    if TYPE == tl.float16:  # noqa: SIM300
        return -64 if BITS == 4 and PLACE % 2 == 1 else -1024
    return -128 if BITS == 4 else 128


@triton.constexpr_function
def loads_words(PLACE, ALIKE, KIND):
    """Whether codes at a place, the first of ALIKE, are in a group whose word none of the span's places before has."""
    return KIND != "pair" or PLACE // ALIKE % 2 == 0


@triton.jit
def word_of(steps, group, groups, n, rows, inside, KIND: tl.constexpr, APART: tl.constexpr):
    """The rows' words of a group; behind the last group, the last. The groups of a pair are so many APART."""
    at = tl.minimum(group, groups - 1)
    if KIND == "pair":
        at = at // (2 * APART) * APART + at % APART
    return tl.load(steps + at * n + rows, inside, other=0)


@triton.jit
def meant(word, group, groups, KIND: tl.constexpr, BITS: tl.constexpr, APART: tl.constexpr):
    """What words say, float32: scale, zero and bias, x = (code - zero) * scale + bias; the bias is 0 where none is."""
    at = tl.minimum(group, groups - 1) // APART
    scale = _half(word >> (at % 2 * 16)) if KIND == "pair" else _half(word)
    # The scale is part of the zero, which takes nothing away, since Triton copies to shared memory, steps ahead, what
    # products' operands are made of.
    zero, bias = scale * 0.0 + (1 << (BITS - 1)), tl.zeros_like(scale)
    if KIND == "zero":
        zero = _half(word >> 16)
    elif KIND == "bias":
        bias = _half(word >> 16) + (1 << (BITS - 1)) * scale
    return scale, zero, bias


@triton.jit
def _half(bits):
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
