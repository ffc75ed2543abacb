"""A layer's KV cache as kernels see it: the planes of each side, and the constants that a kernel is compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton.language as tl
from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.formats.kv_codecs import (
    AffineCodec,
    FloatCodec,
    GroupedCodec,
    ShapedCodec,
    StaticCodec,
    SymmetricCodec,
    VectorCodec,
)
from kvant.formats.kv_stats import LayerStats, polynomials

_DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
TORCH_TYPES = {ours: theirs for theirs, ours in _DOT_TYPES.items()}
_STATIC_KINDS = {torch.int8: "s8", torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}


@dataclass(frozen=True, eq=False)
class Side:
    """The keys or the values of a layer: x = code * scale - shift in the codec's own space.

    Planes are [num_blocks, kv_heads, block_size, words], a block's part in one piece.

    Attributes:
        kind: what a code is: "float" (a number as it is), "u8", "u4" (two a byte, the even element below), "s8",
            "e4m3", "e5m2".
        steps: where scale and shift come from: "none", "static" (`scale`, one a KV head), "scale" (a float16 a vector),
            "affine" (scale and -shift, float16), "words" (`GroupedCodec`'s, one a group).
        codes: floats, or the bytes of all others as uint8.
        meta: [..., words] int16 bits; None where steps are "none" or "static".
        groups: pieces of a vector that have a scale and a shift each.
        hadamard: size of the Hadamard blocks that vectors were multiplied with, 1 for none.
        stats: centre and balance of shaped vectors, feedback, scales: float32 on the cache's device, contiguous.
    """

    kind: str
    steps: str
    codes: Tensor
    meta: Tensor | None
    groups: int
    hadamard: int
    stats: LayerStats

    @property
    def code_stride(self) -> int:
        """Elements of `codes` from block to block."""
        return self.codes.stride(0)

    @property
    def meta_stride(self) -> int:
        """Elements of `meta` from block to block, 0 where there is none."""
        return 0 if self.meta is None else self.meta.stride(0)

    @property
    def order(self) -> int:
        """Terms of the centre's expansion, 0 for no centre."""
        return 0 if self.stats.centre is None else self.stats.centre.coefficients.shape[1]

    @property
    def turning(self) -> int:
        """Pairs that the centre turns."""
        return 0 if self.stats.centre is None else len(self.stats.centre.frequencies)


def side_of(layer: KVLayer, name: str) -> Side:
    """The side called "key" or "value"."""
    fmt, plan = layer.format, layer.plan
    codec, stats = (fmt.key, plan.key_stats) if name == "key" else (fmt.value, plan.value_stats)
    inner = codec.inner if isinstance(codec, ShapedCodec) else codec
    kind, steps = _kind_of(inner)
    codes, *meta = layer.side(name).values()
    shaped = isinstance(codec, ShapedCodec)
    return Side(
        kind=kind,
        steps=steps,
        codes=codes if kind == "float" else codes.view(torch.uint8),
        meta=meta[0].view(torch.int16) if meta else None,
        groups=inner.groups if isinstance(inner, GroupedCodec) else 1,
        hadamard=hadamard_block(_head_dim(kind, codes)) if shaped else 1,
        stats=stats if shaped else LayerStats(scale=stats.scale, feedback=stats.feedback),
    )


def side_arguments(side: Side, prefix: str) -> dict[str, object]:
    """What kernels take of a side, under names that begin with the prefix ("k", "v"); constants have it in capitals."""
    big = prefix.upper()
    return {
        f"{prefix}_codes": side.codes,
        f"{prefix}_meta": side.meta,
        f"{prefix}_scale": side.stats.scale,
        f"{prefix}_balance": side.stats.balance,
        f"{big}_KIND": side.kind,
        f"{big}_STEPS": side.steps,
        f"{big}_GROUPS": side.groups,
        f"{big}_CODE_STRIDE": side.code_stride,
        f"{big}_META_STRIDE": side.meta_stride,
        f"{big}_HADAMARD": side.hadamard,
    }


def centre_arguments(side: Side) -> dict[str, object]:
    """What kernels take of the keys' centre; ORDER is 0 for none."""
    centre = side.stats.centre
    return {
        "centre": None if centre is None else centre.coefficients,
        "frequencies": None if centre is None else centre.frequencies,
        "basis": None if centre is None else basis(side.order, side.codes.device),
        "ORDER": side.order,
        "TURNING": side.turning,
    }


def dot_types(query: torch.dtype, *sides: Side) -> list[tl.dtype]:
    """The type that each side's vectors have in products with queries of this type on tensor cores.

    Codes of integers and of 8-bit floats are exact in float16, queries that meet them are in range.
    """
    types = [side.codes.dtype if side.kind == "float" else torch.float16 for side in sides]
    return [_DOT_TYPES[torch.float32 if query == torch.float32 else dtype] for dtype in types]


def hadamard_block(head_dim: int) -> int:
    """The largest power of two that divides it: see `formats.kv_codecs.hadamard`."""
    return head_dim & -head_dim


@cache
def basis(order: int, device: torch.device) -> Tensor:
    """`polynomials` on a device, [CENTRE_TILE, order] float32, contiguous."""
    return polynomials(order).contiguous().to(device)


def _head_dim(kind: str, codes: Tensor) -> int:
    return codes.shape[-1] * (2 if kind == "u4" else 1)


def _kind_of(codec: VectorCodec) -> tuple[str, str]:
    match codec:
        case FloatCodec():
            return "float", "none"
        case AffineCodec(bits=bits):
            return f"u{bits}", "affine"
        case GroupedCodec():
            return "u4", "words"
        case SymmetricCodec():
            return "s8", "scale"
        case StaticCodec(dtype=dtype):
            return _STATIC_KINDS[dtype], "static"
    raise NotImplementedError(f"{type(codec).__name__} has no kernels here; add its kind to kv_layout.py")
