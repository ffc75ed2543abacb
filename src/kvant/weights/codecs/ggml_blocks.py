"""GGML blocks as packed weights: the stored codes, each group's scale and bias in float16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import Q4_K
from torch import Tensor

from kvant.formats.threads import for_each
from kvant.formats.weight import BLOCK, PackedWeight

Array = np.ndarray[Any, Any]
# Of n blocks: bytes of codes [n, bytes], scales and maybe biases [n, groups] of any float type.
Unpacked = tuple[Array, ...]

_ELEMENTS_AT_ONCE = 1 << 18  # few enough to stay in a core's cache
_KEPT = MappingProxyType({Kind.Q4_0: "q4_0", Kind.Q4_1: "q4_1", Kind.Q8_0: "q8_0"})  # in formats of the same layout
_INFINITE = 0x7C00  # the exponent's bits of a float16 that is no number


@dataclass(frozen=True)
class _Block:
    """A block type as planes of a `PackedWeight`; `unpack` takes the bytes of blocks [n, bytes of a block]."""

    bits: int
    group: int
    biased: bool
    unpack: Callable[[Array], Unpacked]


def packed_bits(kind: Kind) -> float | None:
    """Bits that an element takes as `pack_ggml` packs it; None for types that it does not know."""
    if kind in _KEPT:
        return GGML_QUANT_SIZES[kind][1] * 8 / BLOCK
    block = _BLOCKS.get(kind)
    return None if block is None else block.bits + 16 * (1 + block.biased) / block.group


def pack_ggml(stored: Tensor, kind: Kind, shape: tuple[int, ...]) -> PackedWeight | None:
    """A matrix stored in GGML blocks, without expanding it.

    The codes are the stored ones. So are scales and biases, but for those of Q4_K, Q5_K and Q6_K, which are products
    and rounded to float16.

    Args:
        stored: the rows' bytes [rows, bytes of a row]; a weight of Q4_0, Q4_1 or Q8_0 refers to them.
        kind: the block type.
        shape: [rows, columns].

    Returns:
        None where the type has no packed form, or a scale is beyond float16.
    """
    (rows, columns), data = shape, stored.numpy()
    if kind in _KEPT:
        weight = PackedWeight.in_blocks(_KEPT[kind], stored.view(rows, columns // BLOCK, -1))
        numbers = data.reshape(rows, columns // BLOCK, -1)[..., : -BLOCK * weight.bits // 8]
        return weight if (numbers.view(np.uint16) & _INFINITE != _INFINITE).all() else None
    block = _BLOCKS.get(kind)
    if block is None:
        return None
    affine = [np.empty((rows, columns // block.group), dtype=np.float16) for _ in range(1 + block.biased)]
    planes: list[Array] = [np.empty((rows, columns * block.bits // 8), dtype=np.uint8), *affine]
    step = max(1, _ELEMENTS_AT_ONCE // columns)

    def unpack(first: int) -> None:
        blocks = data[first : first + step].reshape(-1, GGML_QUANT_SIZES[kind][1])
        with np.errstate(over="ignore"):
            for plane, part in zip(planes, block.unpack(blocks), strict=True):
                target = plane[first : first + step]
                target[:] = part.reshape(target.shape)

    for_each(unpack, range(0, rows, step), rows * columns, torch.get_num_threads())
    # Nothing is lost below float16's normal range: a product of a float16 and an integer is a multiple of 2^-24.
    if not all(np.isfinite(plane).all() for plane in affine):
        return None
    return PackedWeight.quantized(block.bits, *(torch.from_numpy(plane) for plane in planes))


def _half(blocks: Array, start: int) -> Array:
    """The float16 number at a byte of each block: [n, 1]."""
    return blocks[:, start : start + 2].view(np.float16)


def _pairs(codes: Array, width: int) -> Array:
    """4-bit codes whose low nibbles are `width` columns and whose high ones are the next: neighbours to one byte."""
    two, mask = np.ascontiguousarray(codes).view(np.uint16), np.uint16(0x0F0F)
    halves = [(nibbles | nibbles >> 4).astype(np.uint8) for nibbles in (two & mask, two >> 4 & mask)]
    return np.stack([half.reshape(len(codes), -1, width // 2) for half in halves], axis=2)


def _nibbles(codes: Array, width: int) -> Array:
    """The same codes, a byte each: [n, columns]."""
    low_high = codes.reshape(len(codes), -1, 1, width) >> np.array([[0], [4]], dtype=np.uint8)
    return (low_high & np.uint8(15)).reshape(len(codes), -1)


def _fifth_bits(blocks: Array) -> Array:
    """Bit i of 4 bytes is column i's: 16 or 0, [n, 32]."""
    return np.unpackbits(blocks, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: Array) -> Unpacked:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return codes + np.uint8(128 - 16), _half(blocks, 0)


def _q5_1(blocks: Array) -> Unpacked:
    return _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8]), _half(blocks, 0), _half(blocks, 2)


def _q4_k(blocks: Array) -> Unpacked:
    return _pairs(blocks[:, 16:], 32), *_k_scales(blocks)


def _q5_k(blocks: Array) -> Unpacked:
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)) << np.uint8(4)
    return _nibbles(blocks[:, 48:], 32) | fifth.reshape(len(blocks), -1), *_k_scales(blocks)


def _q6_k(blocks: Array) -> Unpacked:
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], dtype=np.uint8)
    codes = _nibbles(blocks[:, :128], 64) | (high.reshape(len(blocks), -1) & np.uint8(3)) << np.uint8(4)
    scales = _half(blocks, 208).astype(np.float32) * blocks[:, 192:208].view(np.int8)
    return codes + np.uint8(128 - 32), scales


def _k_scales(blocks: Array) -> tuple[Array, Array]:
    """Scales and biases of Q4_K's and Q5_K's groups: [n, 8] float32."""
    scales, minima = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    d, d_min = (_half(blocks, start).astype(np.float32) for start in (0, 2))
    return d * scales, -d_min * minima


_BLOCKS: Mapping[Kind, _Block] = MappingProxyType(
    {
        Kind.Q4_K: _Block(4, 32, True, _q4_k),
        Kind.Q5_0: _Block(8, 32, False, _q5_0),
        Kind.Q5_1: _Block(8, 32, True, _q5_1),
        Kind.Q5_K: _Block(8, 32, True, _q5_k),
        Kind.Q6_K: _Block(8, 16, False, _q6_k),
    }
)
