"""The randomness of samples: a function of (seed, choice, position), whatever else an engine does."""

from __future__ import annotations

import numpy as np

_AT_ONCE = 64  # making a generator takes as long as drawing thousands of numbers


class Randomness:
    """A number in [0, 1) for each position of one choice's output.

    From a counter-based generator: batches and preemption cannot change it. It keeps no more than what it drew last.

    Args:
        seed: the request's; any integer.
        choice: which of the request's outputs.
    """

    def __init__(self, seed: int, choice: int) -> None:
        self._key = (seed % 2**64, choice)
        self._first = 0
        self._numbers: list[float] = []

    def at(self, position: int) -> float:
        """The number of the output's token at `position`."""
        index = position - self._first
        if not 0 <= index < len(self._numbers):
            self._numbers, self._first, index = self._drawn(position), position, 0
        return self._numbers[index]

    def _drawn(self, first: int) -> list[float]:
        """Of `first` and the positions after it: each count of the generator gives four, of which it takes one."""
        key = np.array(self._key, dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=first))
        numbers: list[float] = generator.random(4 * _AT_ONCE)[::4].tolist()
        return numbers
