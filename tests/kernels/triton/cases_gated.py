"""Gated activations of real MLPs."""

from __future__ import annotations

import torch

from tests.kernels.triton.compile import Case


def _case(activation: str, tokens: int, width: int, dtype: torch.dtype, slow: bool = False) -> Case:
    name = f"gated {activation} {tokens}x{width} {dtype}"
    return Case(name, lambda ops: ops.gated(torch.zeros(tokens, 2 * width, dtype=dtype), activation), slow)


CASES = (
    _case("silu", 1, 11008, torch.bfloat16),
    _case("gelu_tanh", 64, 9216, torch.bfloat16),
    _case("gelu", 64, 9216, torch.float16, slow=True),
    _case("silu", 64, 11009, torch.float32, slow=True),
)
