"""RoPE and KV writes of real heads in every format."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from kvant.formats.kv import KV_FORMATS
from tests.formats.stats import layer_plan_of
from tests.kernels.scenes import scene
from tests.kernels.triton.compile import Case

FEW = (("bf16", 128), ("int8", 128), ("int4", 128), ("k8v4", 64))


def _case(name: str, dim: int, tokens: int) -> Case:
    def run(ops: Any) -> None:
        it = scene(layer_plan_of(KV_FORMATS[name], 2, dim), 2, dim, 16, [(0, tokens)], seed=0)
        qkv = torch.zeros(tokens, 12, dim, dtype=torch.bfloat16)
        q, k, v = qkv.split([8, 2, 2], dim=1)
        rotary = torch.zeros(tokens, dim // 2), torch.zeros(tokens, dim // 2)
        ops.rope_write_kv(q, k, v, rotary, it.cache, it.batch)

    return Case(f"rope_write_kv {name} {dim} of {tokens}", run, (name, dim) not in FEW or tokens > 1)


CASES = tuple(_case(*facts) for facts in product(KV_FORMATS, (64, 80, 128, 256), (1, 300)))
