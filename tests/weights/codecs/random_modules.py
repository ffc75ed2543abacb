"""Stored modules with random bits, and the values they mean."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from tests.weights.codecs.layouts import Parts, awq_gemm_values, awq_gemv_values, gptq_values

Made = tuple[Parts, Tensor]


def words(*shape: int) -> Tensor:
    """int32, any bits."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def scales(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Of either sign, such that codes of 4 bits become weights of about the size that a model of 32 inputs has."""
    return (torch.rand(shape).add(0.5) * 0.05 * torch.randn(shape).sign()).to(dtype)


def gptq(
    rows: int,
    columns: int,
    *,
    bits: int = 4,
    group: int = 32,
    version: int = 1,
    zero: int | None = None,
    g_idx: Tensor | None = None,
) -> Made:
    """`zero` is the stored zero point of every group; None: random ones."""
    groups = -(-columns // group)
    parts = {
        "qweight": words(columns * bits // 32, rows),
        "qzeros": words(groups, -(-rows * bits // 32)),
        "scales": scales(groups, rows) / (1 if bits == 4 else 16),
    }
    if zero is not None:
        parts["qzeros"][:] = sum(zero << (bits * i) for i in range(32 // bits)) - (1 << 32) * (zero >> (bits - 1))
    if g_idx is not None:
        parts["g_idx"] = g_idx.int()
    return parts, gptq_values(parts, bits, version, group)


def awq(rows: int, columns: int, *, group: int = 32) -> Made:
    """The "gemm" layout."""
    groups = -(-columns // group)
    parts = {
        "qweight": words(columns, rows // 8),
        "qzeros": words(groups, rows // 8),
        "scales": scales(groups, rows),
    }
    return parts, awq_gemm_values(parts, group)


def awq_gemv(rows: int, columns: int, *, group: int = 32, width: int = 4) -> Made:
    """The "gemv" layout, its groups padded to 8 * width."""
    parts = {
        "qweight": words(rows, columns // 8),
        "qzeros": words(rows, width),
        "scales": scales(rows, 8 * width),
    }
    return parts, awq_gemv_values(parts, group)


def compressed(
    rows: int, columns: int, scheme: dict[str, Any], *, dtype: torch.dtype = torch.float16, packed: bool = True
) -> Made:
    """A module of a compressed-tensors scheme; its values are those that the library itself decompresses."""
    parsed = QuantizationScheme(targets=["Linear"], **scheme)
    args, bits = parsed.weights, parsed.weights.num_bits
    groups = -(-columns // args.group_size) if args.strategy == "group" else 1
    scale = scales(*((1,) if args.strategy == "tensor" else (rows, groups)), dtype=dtype) / (1 if bits == 4 else 16)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (rows, columns), dtype=torch.int8)
    parts: Parts = {"weight_scale": scale}
    if packed:
        parts |= {"weight_packed": pack_to_int32(codes, bits), "weight_shape": torch.tensor([rows, columns])}
    else:
        parts["weight"] = codes
    if not args.symmetric:
        zeros = torch.randint(low, high, (rows, groups), dtype=torch.int8)
        parts["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0) if packed else zeros
    # In float32, so that nothing is rounded.
    wide = {name: part.float() if name == "weight_scale" else part for name, part in parts.items()}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized" if packed else "int-quantized")
    return parts, compressor.decompress(wide, parsed)["weight"].float()
