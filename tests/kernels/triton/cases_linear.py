"""Linear layers and embeddings of real models, in the configurations that are launched where none was measured."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from kvant.formats.weight import InputCodes, PackedWeight
from kvant.kernels.triton import linear_packed
from tests.kernels.triton.compile import Case

N, K = 4096, 4096
BFLOAT, HALF = torch.bfloat16, torch.float16


@cache
def _packed(bits: int, group: int, kind: str) -> PackedWeight:
    q, scale = torch.zeros(N, K * bits // 8, dtype=torch.uint8), torch.zeros(N, K // group, dtype=HALF)
    given = {"zero": scale.to(torch.uint8)} if kind == "zero" else {"bias": scale} if kind == "bias" else {}
    return PackedWeight.quantized(bits, q, scale, **given)


def _case(m: int, bits: int, group: int, kind: str, dtype: torch.dtype, slow: bool = False) -> Case:
    name = f"linear of {m} tokens, int{bits} g{group} {kind} {dtype}"
    return Case(
        name, lambda ops: ops.linear(torch.zeros(m, K, dtype=dtype), ops.prepare(_packed(bits, group, kind))), slow
    )


def _rounded(ops: Any, m: int) -> None:
    weight = replace(_packed(8, K, "symmetric"), inputs=InputCodes())
    ops.linear(torch.zeros(m, K, dtype=BFLOAT), ops.prepare(weight))


def _candidates(ops: Any, m: int) -> None:
    weight = ops.prepare(_packed(4, 128, "zero"))
    for config in linear_packed.candidates(m, weight, BFLOAT):
        linear_packed.linear_packed(torch.zeros(m, K, dtype=BFLOAT), weight, None, config)


def _embedding(ops: Any) -> None:
    ops.embedding(torch.zeros(16, dtype=torch.int64), ops.prepare(_packed(4, 128, "zero")))


CASES = (
    _case(1, 4, 128, "zero", HALF),
    _case(1, 4, 32, "bias", BFLOAT),
    _case(1, 8, K, "symmetric", BFLOAT),
    _case(64, 4, 128, "zero", BFLOAT),
    _case(100, 4, 128, "zero", BFLOAT),
    _case(256, 4, 128, "symmetric", BFLOAT),
    _case(64, 8, 128, "zero", HALF),
    _case(1, 4, 64, "symmetric", BFLOAT, slow=True),
    _case(1, 8, 32, "symmetric", HALF, slow=True),
    _case(1, 8, 16, "symmetric", BFLOAT, slow=True),
    _case(16, 4, 128, "zero", BFLOAT, slow=True),
    _case(32, 4, 32, "bias", BFLOAT, slow=True),
    _case(64, 4, 32, "bias", BFLOAT, slow=True),
    _case(64, 8, 128, "symmetric", BFLOAT, slow=True),
    _case(64, 4, 128, "symmetric", HALF, slow=True),
    _case(256, 4, 32, "bias", BFLOAT, slow=True),
    _case(256, 8, 128, "zero", HALF, slow=True),
    _case(1000, 4, 128, "zero", BFLOAT, slow=True),
    _case(1, 4, 128, "zero", torch.float32, slow=True),
    Case("linear of 1 token, W8A8", lambda ops: _rounded(ops, 1)),
    Case("linear of 64 tokens, W8A8", lambda ops: _rounded(ops, 64), slow=True),
    Case("linear of 256 tokens, W8A8", lambda ops: _rounded(ops, 256)),
    Case("candidates of 1 token", lambda ops: _candidates(ops, 1), slow=True),
    Case("candidates of 16 tokens", lambda ops: _candidates(ops, 16), slow=True),
    Case("candidates of 300 tokens", lambda ops: _candidates(ops, 300), slow=True),
    Case("embedding int4", _embedding),
)
