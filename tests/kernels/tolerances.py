"""How far a backend's attention may be from the exact one.

A native backend takes the cache's integer codes as they are: softmax weights and queries are rounded to 15 bits, or
queries to 8 for keys of 4 bits, and weights to 7 for values of 4 bits. That is fine on the whole, and now and then
visible in a single element.
"""

from __future__ import annotations

from types import MappingProxyType

from kvant.formats.kv import KVFormat
from kvant.formats.kv_codecs import VectorCodec
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.ops import Ops
from kvant.kernels.reference import ReferenceOps

# By what is rounded to fewest bits: the largest error of an element relative to the largest element, and the error's
# norm relative to the result's. Each two to three times what is found.
IN_AN_ELEMENT = MappingProxyType({24: 0.0, 15: 1.5e-3, 8: 0.12, 7: 0.12})
ON_THE_WHOLE = MappingProxyType({24: 1.2e-6, 15: 2e-4, 8: 1.5e-2, 7: 5e-2})


def rounded_bits(ops: Ops, fmt: KVFormat, head_dim: int) -> int:
    """To how many bits a backend may round queries or softmax weights; 24 where it computes in float32."""
    key, value = code_bits(fmt.key), code_bits(fmt.value)
    if type(ops) is ReferenceOps or key == value == 16:
        return 24
    if type(ops) is CpuOps:
        return min(_bits_met(fmt.key, head_dim, 8), _bits_met(fmt.value, head_dim, 7))
    return 8 if key == 4 else 15


def rounded_bits_of_prompts(ops: Ops, fmt: KVFormat, head_dim: int) -> int:
    """The same for more than a few tokens at once: native kernels take codes as they are if all are of 4 bits."""
    if type(ops) is not CpuOps or (_bits_met(fmt.key, head_dim, 8), _bits_met(fmt.value, head_dim, 7)) == (8, 7):
        return rounded_bits(ops, fmt, head_dim)
    return 24


def _bits_met(codec: VectorCodec, head_dim: int, beside_4_bits: int) -> int:
    """To how many bits native kernels round what meets a side's codes, in groups that they have loops for."""
    bits, size = code_bits(codec), _group_size(codec, head_dim)
    if bits == 16 or head_dim % 32:
        return 24
    if bits == 8 or size == 16:
        return 15
    return 24 if size % 32 else beside_4_bits


def _group_size(codec: VectorCodec, head_dim: int) -> int:
    """Elements of a vector that share a scale."""
    groups = [plane.shape[0] for plane in codec.planes(head_dim) if plane.name == "words"]
    return head_dim // (groups[0] if groups else 1)


def code_bits(codec: VectorCodec) -> int:
    """Of an integer code; 16 for floats."""
    codes = codec.planes(64)[0]
    return 16 if codes.dtype.is_floating_point else 8 * codes.bytes // 64
