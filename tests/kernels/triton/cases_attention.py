"""Attention of real heads in every format, decoding and in chunks."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from kvant.formats.kv import KV_FORMATS
from kvant.kernels.ops import AttentionShape
from tests.formats.stats import layer_plan_of
from tests.kernels.scenes import scene
from tests.kernels.triton.compile import Case

HEADS = {"llama-2-7b": (32, 32, 128), "llama-3-8b": (32, 8, 128), "phi": (32, 32, 80), "gemma": (8, 4, 256)}
FEW = (("bf16", "llama-3-8b", 1), ("int4", "llama-2-7b", 1), ("int8", "llama-3-8b", 1), ("int8", "llama-3-8b", 200))


def _case(name: str, model: str, tokens: int) -> Case:
    heads, kv_heads, dim = HEADS[model]
    dtype = torch.bfloat16 if name == "bf16" else torch.float16

    def run(ops: Any) -> None:
        few = kv_heads // 4  # what is compiled depends on their ratio
        it = scene(layer_plan_of(KV_FORMATS[name], few, dim), few, dim, 64, [(100, tokens)], seed=0)
        q = torch.zeros(tokens, heads // 4, dim, dtype=dtype)
        ops.attention(q, it.cache, it.batch, AttentionShape(heads // 4, few, dim, 0.1))

    return Case(f"attention {name} {model} of {tokens}", run, (name, model, tokens) not in FEW)


CASES = tuple(_case(*facts) for facts in product(KV_FORMATS, HEADS, (1, 200)) if facts[0] != "fp32")
