"""Tokens are put in order a range of logits at a time; which one is drawn does not show it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvant.kernels.ops import Ops, SamplingBatch
from kvant.kernels.reference import ReferenceOps

EDGES = (0, -4, -6, -8, -10, -12, -16, -24, -40)  # of ranges, for temperatures of 1 and 4, and beyond the last
ROWS = {
    "edges": torch.tensor([float(edge) for edge in EDGES for _ in range(3)]),
    "flat": torch.zeros(300),
    "far apart": torch.linspace(0, -200, 300),
    "forbidden": torch.tensor([-torch.inf] * 20 + [0.0, -30.0, -5.0]),
}
WISHES = {
    "plain": (0, 1.0, 0.0),
    "top_k": (7, 1.0, 0.0),
    "top_k and top_p": (11, 0.9, 0.0),
    "top_p": (0, 0.97, 0.0),
    "min_p": (0, 1.0, 0.001),
}


def drawn(ops: Ops, logits: Tensor, temperature: float, wish: str, uniform: Tensor) -> list[int]:
    """The tokens that so many numbers give."""
    top_k, top_p, min_p = WISHES[wish]
    count = len(uniform)
    params = SamplingBatch(
        torch.full((count,), temperature), torch.full((count,), top_k), torch.full((count,), top_p),
        torch.full((count,), min_p), uniform,
    )  # fmt: skip
    return ops.sample(logits.expand(count, -1).contiguous(), params).tolist()


@pytest.mark.parametrize("temperature", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("row", ROWS)
def test_the_token_is_the_references(native, row, wish, temperature):
    generator = torch.Generator().manual_seed(1)
    logits = ROWS[row][torch.randperm(len(ROWS[row]), generator=generator)]
    uniform = torch.cat(
        [
            torch.rand(200, dtype=torch.float64, generator=generator),
            torch.tensor([0.0, 1 - 2**-40], dtype=torch.float64),
        ]
    )
    found, expected = (drawn(ops, logits, temperature, wish, uniform) for ops in (native(1), ReferenceOps()))
    # Where a number falls between two tokens, rounding may tell for either; all but the very edges must agree.
    differing = [n for n, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    assert len(differing) <= 1, f"{len(differing)} of {len(found)}"
    assert all(logits[token] > -torch.inf for token in found)
