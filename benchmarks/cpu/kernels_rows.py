"""What is done to each row: norms, gated activations, embeddings, and sampling from logits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from kernel import Kernel, Planned

from kvant.formats.weight import PackedWeight
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.ops import SamplingBatch

TOKENS = (1, 256)
HIDDEN, INTERMEDIATE, VOCABULARY = 576, 1536, 49_152  # SmolLM2-135M's
_SPREAD = 3  # of logits, about a model's
_EPS = 1e-5
_GROUP = 32


def kernels(ops: CpuOps) -> Iterator[Planned]:
    """Each with one token and with many; a unit is a token's row."""
    for tokens in TOKENS:
        for make, name in ((_norm, f"rms_norm {HIDDEN}"), (_gated, f"gated silu {INTERMEDIATE}"),
                           (_embedding, f"embedding int4 {HIDDEN}")):  # fmt: skip
            yield f"{name} rows {tokens}", partial(make, ops, tokens)
    for temperature, kind in ((0.0, "greedy"), (0.7, "top_p 0.9")):
        yield f"sample {kind} of {VOCABULARY}", partial(_sample, ops, temperature)


def _norm(ops: CpuOps, tokens: int) -> Kernel:
    x, weight = torch.randn(tokens, HIDDEN), torch.rand(HIDDEN)
    operations = 4 * tokens * HIDDEN  # a square and its sum, two factors
    return Kernel(lambda: ops.rms_norm(x, weight, _EPS), tokens, 2 * x.nbytes, operations, "fma")


def _gated(ops: CpuOps, tokens: int) -> Kernel:
    x = torch.randn(tokens, 2 * INTERMEDIATE)
    return Kernel(lambda: ops.gated(x, "silu"), tokens, x.nbytes * 3 // 2, 0, "fma")


def _embedding(ops: CpuOps, tokens: int) -> Kernel:
    codes = torch.randint(256, (VOCABULARY, HIDDEN // 2), dtype=torch.uint8)
    scale = torch.rand(VOCABULARY, HIDDEN // _GROUP).half()
    weight = ops.prepare(PackedWeight.quantized(4, codes, scale))
    ids = torch.randint(VOCABULARY, (tokens,))
    row = codes[0].nbytes + scale[0].nbytes + HIDDEN * torch.float32.itemsize
    return Kernel(lambda: ops.embedding(ids, weight), tokens, tokens * row, 0, "fma")


def _sample(ops: CpuOps, temperature: float) -> Kernel:
    logits, one = torch.randn(1, VOCABULARY) * _SPREAD, torch.ones(1)
    how = SamplingBatch(one * temperature, one.long() * 0, one * 0.9, one * 0, one.double() * 0.5)
    return Kernel(lambda: ops.sample(logits, how), 1, logits.nbytes, 0, "fma")
