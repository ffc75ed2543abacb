"""Rounding in kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rint(x):
    """To the nearest integer, ties to even, as `Tensor.round`; x float32, |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def finite(x):
    """Where x is finite."""
    return tl.abs(x) < float("inf")


@triton.jit
def float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """The bytes of an 8-bit float with so many bits of mantissa for x float32, to the nearest, ties to even.

    x is within the type's range. In integers, since compute capability 8.0 has no instruction for it.
    """
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    dropped: tl.constexpr = 23 - MANTISSA
    rounded = (bits + (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)) >> dropped
    normal = rounded - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number steps are all the same; the largest of these codes is that number's.
    tiny = rint(tl.abs(x) * 2.0 ** (MANTISSA + BIAS - 1)).to(tl.int32)
    code = tl.where(tl.abs(x) < 2.0 ** (1 - BIAS), tiny, normal)
    return tl.where(x < 0, code | 128, code).to(tl.uint8)
