"""A model's predictions beside those of a baseline, in numbers with their standard errors."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

PIECES = 16


@dataclass(frozen=True)
class Row:
    """What one KV cache costs. Standard errors are those of `standard_error`.

    Attributes:
        kv_cache_dtype: the format as it was asked for.
        plan: the name of the plan that came of it, which tells layers with formats of their own.
        bits_per_element: really stored at 4096 tokens, metadata and 16-bit sinks included.
        ppl: perplexity, exp of the mean negative log-likelihood.
        ppl_change: relative to the baseline, 0.01 is 1 % worse; its error is of the paired difference.
        kl: mean KL(baseline || format) of the next-token distributions, in nats.
        top1: share of predictions whose likeliest token is the baseline's.
        tokens: predictions that the means are over.
    """

    kv_cache_dtype: str
    plan: str
    bits_per_element: float
    ppl: float
    ppl_stderr: float
    ppl_change: float
    ppl_change_stderr: float
    kl: float
    kl_stderr: float
    top1: float
    top1_stderr: float
    tokens: int
    windows: int
    window_size: int


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


def summarize(name: str, plan: str, bits_per_element: float, scores: Scores, baseline: Scores) -> Row:
    """The row of a plan; scores are [windows, predictions], all of a window but its first token being predicted."""
    windows, predictions = scores.nll.shape
    difference = scores.nll - baseline.nll
    ppl, ratio = float(scores.nll.mean().exp()), float(difference.mean().exp())
    return Row(
        kv_cache_dtype=name,
        plan=plan,
        bits_per_element=bits_per_element,
        ppl=ppl,
        ppl_stderr=ppl * standard_error(scores.nll),
        ppl_change=ratio - 1,
        ppl_change_stderr=ratio * standard_error(difference),
        kl=float(scores.kl.mean()),
        kl_stderr=standard_error(scores.kl),
        top1=float(scores.agrees.mean()),
        top1_stderr=standard_error(scores.agrees),
        tokens=windows * predictions,
        windows=windows,
        window_size=predictions + 1,
    )
