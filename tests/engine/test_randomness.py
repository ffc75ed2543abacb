"""The randomness of samples is a function of seed, choice and position, the same one from version to version."""

from __future__ import annotations

import numpy as np
import pytest

from kvant.engine.randomness import Randomness


def one(seed: int, choice: int, position: int) -> float:
    """The number of one place, from a generator of its own."""
    key = np.array([seed % 2**64, choice], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=position)).random())


@pytest.mark.parametrize(("seed", "choice"), [(0, 0), (5, 3), (-3, 1), (2**70 + 1, 0)])
def test_a_place_has_its_number_whichever_was_asked_for_before(seed, choice):
    randomness = Randomness(seed, choice)
    places = [*range(140), 139, 3, 4, 200, 90, 63, 64]
    assert [randomness.at(place) for place in places] == [one(seed, choice, place) for place in places]


def test_numbers_are_those_of_earlier_versions():
    """Somebody may have noted a seed."""
    assert [Randomness(7, 1).at(place) for place in (0, 1, 100)] == [
        0.8824668302545412,
        0.718174498323604,
        0.5932074603057104,
    ]
