"""Comparing two formats on the same problems: what is known of a score, and of the difference of two paired ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt

import numpy as np

RESAMPLES = 10_000
SEED = 0
_Z95 = 1.959963984540054

Interval = tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """One format's results set against another's, problem by problem.

    Attributes:
        difference: of the two scores; negative is a loss.
        interval: 95% bootstrap interval of the difference. It is empty where no problem changed, which does not mean
            that none would among others.
        p_value: of McNemar's exact test that gains and losses are equally likely, two-sided.
        gained, lost: problems that only the one or only the other solved.
    """

    difference: float
    interval: Interval
    p_value: float
    gained: int
    lost: int


def wilson(successes: int, n: int) -> Interval:
    """Wilson's 95% interval of a share of n >= 1 problems."""
    share, z2 = successes / n, _Z95**2
    centre = share + z2 / (2 * n)
    spread = _Z95 * sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = (centre - spread) / (1 + z2 / n), (centre + spread) / (1 + z2 / n)
    return max(low, 0.0), min(high, 1.0)


def compare(before: Sequence[int], after: Sequence[int]) -> Comparison:
    """What changed from one vector of 0 and 1 to another; both list the same problems in the same order."""
    pairs = list(zip(before, after, strict=True))
    gained, lost = pairs.count((0, 1)), pairs.count((1, 0))
    return Comparison(
        difference=(gained - lost) / len(pairs),
        interval=bootstrap(gained, lost, len(pairs)),
        p_value=mcnemar(gained, lost),
        gained=gained,
        lost=lost,
    )


def bootstrap(gained: int, lost: int, n: int) -> Interval:
    """The 95% percentile interval of (gained - lost) / n over resamples of the n pairs.

    Drawing n pairs with replacement is one multinomial draw of how many of each kind they are.
    """
    shares = [gained / n, lost / n, (n - gained - lost) / n]
    draws = np.random.default_rng(SEED).multinomial(n, shares, size=RESAMPLES)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975]).tolist()
    return low, high


def mcnemar(gained: int, lost: int) -> float:
    """Probability of a split at least this uneven if each changed problem were gained or lost by a fair coin."""
    changed = gained + lost
    tail = sum(comb(changed, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / (1 << changed))
