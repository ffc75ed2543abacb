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

HEADS = {
    "llama-2-7b": (32, 32, 128),
    "llama-3-8b": (32, 8, 128),
    "phi": (32, 32, 80),
    "gemma": (8, 4, 256),
    "yi-6b": (32, 4, 128),
}
FEW = (
    ("int4", "yi-6b", 1),
    ("bf16", "llama-3-8b", 1),
    ("int4", "llama-2-7b", 1),
    ("int8", "llama-3-8b", 1),
    ("int8", "llama-3-8b", 200),
)


def _case(name: str, model: str, tokens: int) -> Case:
    heads, kv_heads, dim = HEADS[model]
    dtype = torch.bfloat16 if name == "bf16" else torch.float16

    def run(ops: Any) -> None:
        few = kv_heads // 4  # what is compiled depends on their ratio
        it = scene(layer_plan_of(KV_FORMATS[name], few, dim), few, dim, 64, [(100, tokens)], seed=0)
        q = torch.zeros(tokens, heads // 4, dim, dtype=dtype)
        ops.attention(q, it.cache, it.batch, AttentionShape(heads // 4, few, dim, 0.1))

    return Case(f"attention {name} {model} of {tokens}", run, (name, model, tokens) not in FEW)


def _batches(ops: Any) -> None:
    """Of other sizes, and with wider tables; the longest chunk has as many tokens."""
    plan, shape = layer_plan_of(KV_FORMATS["fp16"], 1, 64), AttentionShape(4, 1, 64, 0.1)
    for lengths in ([(40, 16)], [(40, 16), (20, 1), (7, 7)], [(2000, 16), *[(30, 1)] * 4]):
        it = scene(plan, 1, 64, 64, lengths, seed=0)
        ops.attention(torch.zeros(it.tokens, 4, 64, dtype=torch.float16), it.cache, it.batch, shape)


BATCHES = Case("attention of several batches", _batches)
CASES = (BATCHES, *(_case(*facts) for facts in product(KV_FORMATS, HEADS, (1, 200)) if facts[0] != "fp32"))
