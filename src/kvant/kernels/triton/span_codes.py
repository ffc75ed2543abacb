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
    if not ASSEMBLY:
        codes = ((words >> (BITS * PLACE)) & ((1 << BITS) - 1)).to(tl.float32)
        return (codes - zero[:, None]).to(TYPE)
    elif TYPE == tl.float16:  # noqa: SIM300
        # A fraction of 10 bits also holds a code above another: left there, without a shift, it counts 16 times.
        HIGH: tl.constexpr = BITS == 4 and PLACE % 2 == 1
        MASK: tl.constexpr = 0x00F000F0 if HIGH else (0x000F000F if BITS == 4 else 0x00FF00FF)
        STEP: tl.constexpr = 0x2C002C00 if HIGH else 0x3C003C00
        HALVES: tl.constexpr = f"""{{ .reg .b32 t, step; mov.b32 step, {STEP}; shr.u32 t, $1, {BITS * PLACE - 4 * HIGH};
            lop3.b32 t, t, {MASK}, 0x64006400, 0xEA; fma.rn.f16x2 $0, t, step, $2; }}"""
        return _asm(HALVES, words, ((-64 if HIGH else -1024) - zero).to(TYPE))
    elif BITS == 4:
        FOUR_BITS: tl.constexpr = f"""{{ .reg .b32 t, one; mov.b32 one, 0x3F803F80; shr.u32 t, $1, {BITS * PLACE};
            lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, t, one, $2; }}"""
        return _asm(FOUR_BITS, words, (-128 - zero).to(TYPE))
    else:
        # Bfloat16's fraction has 7 bits: the code's highest bit makes the power that is taken away 128 and not 256.
        EIGHT_BITS: tl.constexpr = f"""{{ .reg .b32 t, u, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xBF80BF80;
            shr.u32 t, $1, {BITS * PLACE}; lop3.b32 u, t, 0x00800080, 0x43804380, 0x6A;
            lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA; fma.rn.bf16x2 t, u, less, t;
            fma.rn.bf16x2 $0, t, one, $2; }}"""
        return _asm(EIGHT_BITS, words, (128 - zero).to(TYPE))


@triton.jit
def _asm(CODE: tl.constexpr, words, less):
    return tl.inline_asm_elementwise(CODE, "=r,r,r", [words, less[:, None]], dtype=less.dtype, is_pure=True, pack=2)


@triton.constexpr_function
def loads_words(PLACE, ALIKE, KIND):
    """Whether codes at a place, the first of ALIKE, are in a group whose word none of the span's places before has."""
    return KIND != "pair" or PLACE // ALIKE % 2 == 0


@triton.jit
def word_of(steps, group, groups, n, rows, inside, KIND: tl.constexpr):
    """The rows' words of a group; behind the last group, the last."""
    at = tl.minimum(group, groups - 1)
    return tl.load(steps + (at // 2 if KIND == "pair" else at) * n + rows, inside, other=0)


@triton.jit
def meant(word, group, groups, KIND: tl.constexpr, BITS: tl.constexpr):
    """What words say, float32: scale, zero and bias, x = (code - zero) * scale + bias; the bias is 0 where none is."""
    at = tl.minimum(group, groups - 1)
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
