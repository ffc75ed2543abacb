"""What one KV cache costs, as a row of a table."""

from __future__ import annotations

from dataclasses import dataclass

from kvant.quantize.scores import Scores, standard_error


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
