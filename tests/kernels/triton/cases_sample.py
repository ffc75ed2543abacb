"""Sampling from real vocabularies."""

from __future__ import annotations

from typing import Any

import torch

from kvant.kernels.ops import SamplingBatch
from kvant.kernels.triton.sample import greedy
from tests.kernels.triton.compile import Case

VOCAB = 128256


def _drawn(ops: Any, rows: int, vocab: int) -> None:
    number = torch.ones(rows)
    ops.sample(torch.zeros(rows, vocab), SamplingBatch(number, number.long(), number, number, number.double()))


CASES = (
    Case(f"greedy {VOCAB}", lambda ops: greedy(torch.zeros(4, VOCAB))),
    Case(f"sample {VOCAB}", lambda ops: _drawn(ops, 4, VOCAB)),
    Case("sample 151665", lambda ops: _drawn(ops, 4, 151665), slow=True),
)
