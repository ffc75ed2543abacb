"""How far a backend's attention may be from the exact one.

A native backend takes the cache's integer codes as they are: softmax weights and queries are rounded to 16 bit, or, for
codes of 4 bits, to 8. That is fine on the whole, and now and then visible in a single element.
"""

from __future__ import annotations

from types import MappingProxyType

from kvant.formats.kv import KVFormat
from kvant.formats.kv_codecs import VectorCodec
from kvant.kernels.ops import Ops
from kvant.kernels.reference import ReferenceOps

# By the bits of the codes that are met as they are: the largest error of an element relative to the largest element,
# and the error's norm relative to the result's. Each two to three times what is found.
IN_AN_ELEMENT = MappingProxyType({16: 0.0, 8: 1.5e-3, 4: 0.12})
ON_THE_WHOLE = MappingProxyType({16: 1.2e-6, 8: 2e-4, 4: 5e-2})


def rounded_bits(ops: Ops, fmt: KVFormat) -> int:
    """4 where a backend may round to 8 bit, 8 where it may round to 16 bit, 16 where it computes in float32."""
    return 16 if type(ops) is ReferenceOps else min(code_bits(fmt.key), code_bits(fmt.value))


def code_bits(codec: VectorCodec) -> int:
    """Of an integer code; 16 for floats."""
    codes = codec.planes(64)[0]
    return 16 if codes.dtype.is_floating_point else 8 * codes.bytes // 64
