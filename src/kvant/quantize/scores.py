"""A model's predictions beside those of a baseline, in numbers with their standard errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

PIECES = 16


@dataclass(frozen=True)
class Scores:
    """Predictions in numbers, each [predictions] or [windows, predictions] float64.

    Attributes:
        nll: negative log-likelihood of the token that really follows, in nats.
        kl: KL(baseline || this) in nats.
        agrees: 1 where the likeliest token is the baseline's, else 0.
    """

    nll: Tensor
    kl: Tensor
    agrees: Tensor

    def by_window(self, windows: int) -> Scores:
        """[predictions] -> [windows, predictions]."""
        return Scores(*(values.view(windows, -1) for values in (self.nll, self.kl, self.agrees)))


def score(baseline: Tensor, logits: Tensor, targets: Tensor) -> Scores:
    """Predictions beside the baseline's.

    The KL is never negative, and exactly 0 for equal logits. Logits that are not finite give nan or inf.

    Args:
        baseline: [R, vocab] float32 logits.
        logits: [R, vocab] float32.
        targets: [R] int64, the tokens that really follow.
    """
    expected, found = (torch.log_softmax(x.double(), dim=-1) for x in (baseline, logits))
    p = expected.exp()
    # Where p is 0, both logarithms may be -inf, whose difference is nan.
    kl = torch.where(p > 0, p * (expected - found), 0.0).sum(dim=-1).clamp(min=0)
    return Scores(
        nll=-found.gather(1, targets.unsqueeze(1)).squeeze(1),
        kl=kl,
        agrees=(baseline.argmax(dim=-1) == logits.argmax(dim=-1)).double(),
    )


def score_all(logits: Callable[[slice], tuple[Tensor, Tensor]], targets: Tensor, at_once: int) -> tuple[Scores, Scores]:
    """The baseline's scores beside itself, and `score` of other predictions, for many rows.

    Args:
        logits: some rows of the baseline's logits, and the same rows of those to be scored.
        targets: [R] int64, of all rows.
        at_once: how many rows of both are held.
    """
    # Made before the loop: small results that are kept between large blocks would leave the heap full of holes.
    own, others = (Scores(*(torch.empty(len(targets), dtype=torch.float64) for _ in range(3))) for _ in range(2))
    for first in range(0, len(targets), at_once):
        rows = slice(first, first + at_once)
        baseline, found = logits(rows)
        _put(own, rows, Scores(_nll(baseline, targets[rows]), torch.zeros(1), torch.ones(1)))
        _put(others, rows, score(baseline, found, targets[rows]))
    return own, others


def _put(into: Scores, rows: slice, some: Scores) -> None:
    for name in ("nll", "kl", "agrees"):
        getattr(into, name)[rows] = getattr(some, name)


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """[R] float64."""
    wide = logits.double()
    return wide.logsumexp(dim=-1) - wide.gather(1, targets.unsqueeze(1)).squeeze(1)


def standard_error(values: Tensor) -> float:
    """Of the mean of values [windows, predictions], each window's mean being one observation.

    Predictions of one window are not independent. So a single window is cut into `PIECES` consecutive parts, each an
    observation. Fewer than two observations give nan.
    """
    if len(values) == 1:
        pieces = values[0].tensor_split(min(PIECES, values.shape[1]))
        means = torch.stack([piece.mean() for piece in pieces])
    else:
        means = values.mean(dim=1)
    return float(means.std(correction=1)) / len(means) ** 0.5 if len(means) > 1 else nan
