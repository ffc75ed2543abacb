"""The centre of keys: the turning mean, followed by a polynomial within each tile of positions."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from kvant.formats.kv_stats import CENTRE_TILE, Centre, polynomials, turn
from kvant.models.spec import RopeSpec
from kvant.quantize.kv_constants import frequencies
from tests.formats.vectors import HEAD_DIMS

SOME = settings(max_examples=40)
DIMS = st.sampled_from((8, *HEAD_DIMS))
POSITIONS = st.lists(st.integers(0, 200_000), min_size=1, max_size=20)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs_of(dim: int, part: float, theta: float = 10_000.0) -> torch.Tensor:
    """The frequencies of RoPE over this part of a head."""
    return frequencies(RopeSpec(dim=int(dim * part) // 2 * 2, theta=theta))


def turned(mean: torch.Tensor, positions: np.ndarray, rates: torch.Tensor) -> np.ndarray:
    """mean [kv_heads, head_dim] at each position, the pairs as complex numbers: [kv_heads, tokens, head_dim]."""
    half, wide = len(rates), mean.double().numpy()[:, None]
    turns = np.exp(1j * positions[:, None] * rates.double().numpy())
    pairs = (wide[..., :half] + 1j * wide[..., half : 2 * half]) * turns
    still = np.broadcast_to(wide[..., 2 * half :], (len(mean), len(positions), mean.shape[1] - 2 * half))
    return np.concatenate([pairs.real, pairs.imag, still], axis=-1)


@given(dim=DIMS, part=st.sampled_from((0.0, 0.5, 0.75, 1.0)), positions=POSITIONS, seed=st.integers(0, 99))
@SOME
def test_turn_is_ropes_rotation(dim, part, positions, seed):
    """Precise for long texts too: an angle of 200,000 radians in float32 would be off by hundredths."""
    mean, rates = random(seed, 2, dim), pairs_of(dim, part)
    expected = turned(mean, np.array(positions), rates)
    for x in (mean.unsqueeze(1), mean.unsqueeze(1).expand(-1, len(positions), -1)):
        found = turn(x, torch.tensor(positions), rates)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("order", [1, 2, 4, 7])
def test_polynomials_are_orthonormal_and_each_rises_one_degree_above_the_one_before(order):
    basis = polynomials(order).double()
    assert basis.shape == (CENTRE_TILE, order)
    torch.testing.assert_close(basis.T @ basis, torch.eye(order).double(), atol=1e-6, rtol=0)
    for degree, column in enumerate(basis.T):
        differences = torch.diff(column, n=degree)
        assert differences.std() < 1e-5
        assert differences.mean() > 0
    assert torch.allclose(polynomials(order), polynomials(order + 1)[:, :order], atol=1e-6)


@given(
    dim=DIMS, part=st.sampled_from((0.0, 0.5, 1.0)), order=st.integers(1, 8), tile=st.integers(0, 3000),
    seed=st.integers(0, 99),
)  # fmt: skip
@SOME
def test_the_centre_is_the_least_squares_fit_to_the_turning_mean(dim, part, order, tile, seed):
    """Of all polynomials of its order, in the tile's own frame or any other."""
    mean, rates = random(seed, 3, dim), pairs_of(dim, part)
    positions = np.arange(tile * CENTRE_TILE, (tile + 1) * CENTRE_TILE)
    exact = turned(mean, positions, rates)
    basis = np.polynomial.legendre.legvander(np.linspace(-1, 1, CENTRE_TILE), order - 1)
    columns = exact.transpose(1, 0, 2).reshape(CENTRE_TILE, -1)
    fit = basis @ np.linalg.lstsq(basis, columns, rcond=None)[0]
    expected = fit.reshape(CENTRE_TILE, 3, dim).transpose(1, 0, 2)
    found = Centre.of_mean(mean, rates, order).at(torch.from_numpy(positions))
    assert (found.shape, found.dtype) == (expected.shape, torch.float32)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


@given(dim=DIMS, part=st.sampled_from((0.5, 1.0)), positions=POSITIONS, seed=st.integers(0, 99))
@SOME
def test_with_as_many_terms_as_positions_it_is_the_turning_mean_itself(dim, part, positions, seed):
    mean, rates = random(seed, 2, dim), pairs_of(dim, part)
    found = Centre.of_mean(mean, rates, CENTRE_TILE).at(torch.tensor(positions))
    np.testing.assert_allclose(found.numpy(), turned(mean, np.array(positions), rates), atol=5e-5)


@given(dim=DIMS, order=st.integers(1, 6), positions=POSITIONS, seed=st.integers(0, 99))
@SOME
def test_without_rope_it_is_the_mean(dim, order, positions, seed):
    mean = random(seed, 2, dim)
    found = Centre.of_mean(mean, frequencies(None), order).at(torch.tensor(positions))
    torch.testing.assert_close(found, mean.unsqueeze(1).expand_as(found), atol=1e-5, rtol=0)


def test_slow_pairs_are_followed_and_of_fast_ones_nothing_is_subtracted():
    rates = torch.tensor([1.0, 0.01])
    centre = Centre.of_mean(torch.ones(1, 4), rates, 4).at(torch.arange(1000))
    exact = torch.from_numpy(turned(torch.ones(1, 4), np.arange(1000), rates))
    assert (centre - exact)[..., 1::2].abs().max() < 0.01
    assert centre[..., 0::2].square().mean() < 0.1


@given(order=st.integers(1, 5), positions=POSITIONS, data=st.data())
@SOME
def test_a_positions_centre_does_not_depend_on_what_else_is_asked(order, positions, data):
    """Bit for bit: codes hang on it."""
    centre = Centre.of_mean(random(1, 2, 80), pairs_of(80, 0.75), order)
    together = centre.at(torch.tensor(positions))
    some = data.draw(st.lists(st.integers(0, len(positions) - 1), min_size=1))
    assert torch.equal(centre.at(torch.tensor(positions)[some]), together[:, some])
