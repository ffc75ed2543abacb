"""Triton's interpreter, made to round as devices do."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
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


def count_with_scalars(patch: pytest.MonkeyPatch) -> None:
    """Let loops count to a scalar: Triton 3.6 has it as an array of one element, no integer for NumPy 2.4."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch.setattr(interpreter, "_patch_lang_tensor", patch_lang_tensor)


def run_assembly(patch: pytest.MonkeyPatch) -> None:
    """Let PTX be run that takes two elements of 16 bits a register: of the instructions, those in `_run`."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_inline_asm(
        self: Any, code: str, constraints: str, values: list[Any], types: list[Any], pure: bool, pack: int
    ) -> Any:
        if constraints == "=f,0" and code.startswith("//"):  # what it is given, unchanged
            return SimpleNamespace(get_result=lambda at: values[0])
        assert (constraints, pack) == (",".join([*["=r"] * len(types), *["r"] * len(values)]), 2)
        shape = values[0].data.shape
        registers = {
            f"${at + len(types)}": np.ascontiguousarray(value.data).reshape(-1).view(np.uint32)
            for at, value in enumerate(values)
        }
        for line in code.strip(" {}").split(";"):
            _run(line.replace(",", " ").split(), registers)
        return SimpleNamespace(
            get_result=lambda at: TensorHandle(
                _elements(registers[f"${at}"], types[at]).reshape(shape), types[at].scalar
            )
        )

    patch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm)


def _elements(register: Any, of: Any) -> Any:
    return register.view(np.float16 if "fp16" in str(of.scalar) else np.uint16)


def _run(words: list[str], registers: dict[str, Any]) -> None:
    """An instruction on registers of all pairs."""
    if not words or words[0] == ".reg":
        return
    name, to, *operands = words
    a, *more = (registers[it] if it in registers else np.uint32(int(it, 0)) for it in operands)
    match name:
        case "mov.b32":
            found = a
        case "shr.u32":
            found = a >> more[0]
        case "lop3.b32":
            b, c, table = more
            found = np.uint32(0)
            for at in range(8):
                if int(table) >> at & 1:
                    found = found | (a if at & 4 else ~a) & (b if at & 2 else ~b) & (c if at & 1 else ~c)
        case "fma.rn.f16x2" | "fma.rn.bf16x2":
            kind = torch.float16 if name.endswith(".f16x2") else torch.bfloat16
            length = max(np.size(it) for it in (a, *more))
            x, y, z = (
                torch.from_numpy(np.broadcast_to(it, length).copy().view(np.int16)).view(kind).double()
                for it in (a, *more)
            )
            found = (x * y + z).to(kind).view(torch.int16).numpy().view(np.uint32)
        case _:
            raise NotImplementedError(name)
    registers[to] = found


def patch_what_is_known(patch: pytest.MonkeyPatch) -> None:
    """Let kernels call their helpers for less: each call looks through all of `triton.language` for what to replace."""
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        if package not in names:
            names[package] = [name for name, it in inspect.getmembers(package) if interpreter.tl.core.is_builtin(it)]
        for name in names[package]:
            member = getattr(package, name)
            if interpreter.tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    patch.setattr(interpreter, "_patch_builtin", patch_builtin)
