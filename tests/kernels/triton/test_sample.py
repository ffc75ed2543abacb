"""Sampling where the parity test does not look: vocabularies of several pieces, ties among them, rows of all kinds."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kvant.kernels.ops import SamplingBatch
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.triton import sample as triton_sample
from kvant.kernels.triton.sample import greedy, sample

VOCAB = 1000


@pytest.fixture(autouse=True)
def _pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_sample, "BLOCK", 128)


def logits_of(rows: int, ties: bool) -> torch.Tensor:
    logits = 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows))
    return logits.round() if ties else logits


@pytest.mark.parametrize("ties", [False, True])
def test_the_first_maximum_of_each_row(ties):
    logits = logits_of(5, ties)
    logits[3] = float("-inf")
    logits[4, 700:] = float("-inf")
    assert greedy(logits).tolist() == logits.argmax(-1).tolist()
    assert greedy(logits[1:, :999]).tolist() == logits[1:, :999].argmax(-1).tolist()
    assert greedy(logits[:0]).shape == (0,)


@pytest.mark.parametrize("ties", [False, True])
def test_draws_are_those_of_a_sorted_vocabulary(ties):
    logits = logits_of(60, ties)
    rows = torch.arange(60)
    params = SamplingBatch(
        temperature=torch.tensor([0.0, 0.5, 1.0, 1.5])[rows % 4],
        top_k=torch.tensor([0, 1, 40, 2000, 300])[rows % 5],
        top_p=torch.tensor([1.0, 0.9, 1e-6])[rows % 3],
        min_p=torch.tensor([0.0, 0.02])[rows // 2 % 2],
        uniform=torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
    )
    assert sample(logits, params).tolist() == ReferenceOps().sample(logits, params).tolist()


def test_the_ends_of_the_distribution_are_drawn():
    logits = logits_of(3, False)
    logits[:, VOCAB // 2 :] = float("-inf")
    rows = torch.ones(3)
    ends = torch.tensor([0.0, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    params = SamplingBatch(50 * rows, 0 * rows.long(), rows, 0 * rows, ends)
    order = logits.argsort(dim=-1, descending=True)
    drawn = sample(logits, params)
    assert drawn[0] == order[0, 0]
    assert drawn[1] == order[1, VOCAB // 2 - 1]
    assert drawn[2] == ReferenceOps().sample(logits, params)[2]
