"""Triton's interpreter, made to round as devices do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def round_to_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Let float32 become bfloat16 by rounding to the nearest: left alone, the interpreter cuts the last bits off."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy().reshape(src.data.shape), tl.bfloat16)

    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)


def multiply_bfloat16(patch: pytest.MonkeyPatch) -> None:
    """Let products of bfloat16 be of its numbers: left alone, the interpreter multiplies the bits as integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = np.ascontiguousarray(handle.data).view(np.uint16).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        return dot(self, wide(a), wide(b), *more)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
