"""Statistics of inputs, against plain sums."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvant.errors import NotFiniteError
from kvant.quantize import moments
from kvant.quantize.moments import Moments


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    width=st.integers(1, 30),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_they_are_the_sums_over_all_texts(counts, width, dtype):
    texts = [torch.randn(count, width).to(dtype) for count in counts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_TOKENS_AT_ONCE", 16)
        patch.setattr(moments, "_COLUMNS_AT_ONCE", 8)
        found = Moments.of(texts)
    x = torch.cat(texts).double()
    torch.testing.assert_close(found.second.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.magnitude.double(), x.abs().mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.largest.double(), x.abs().amax(0))
    assert found.count == len(x)


def test_a_sample_is_kept_of_every_text():
    texts = [torch.full((3000, 2), float(i)) for i in range(3)]
    sample = Moments.of(texts).sample
    assert len(sample) <= 1024 + 3
    assert sample.unique().tolist() == [0, 1, 2]


def test_the_sample_does_not_prefer_positions():
    """Windows of one length, each row telling its position."""
    windows = [torch.arange(512.0).repeat(8).unsqueeze(1) for _ in range(4)]
    positions = Moments.of(windows).sample.flatten()
    assert len(positions.unique()) > 300
    assert (positions == 0).float().mean() < 0.02


def test_dividing_inputs_is_dividing_their_moments():
    x, scale = torch.randn(64, 8), torch.rand(8) + 0.5
    found, expected = Moments.of([x]).divided(scale), Moments.of([x / scale])
    for name in ("second", "magnitude", "largest", "sample"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_a_part_can_be_taken_off():
    texts = [torch.randn(count, 9) for count in (30, 5, 14)]
    whole, rest = Moments.of(texts), Moments.of(texts[:2])
    found = whole.without(Moments.of(texts[2:]))
    torch.testing.assert_close(found.second, rest.second)
    torch.testing.assert_close(found.magnitude, rest.magnitude)
    assert (found.count, found.importance.min() > 0) == (35, True)


def test_a_loss_is_the_mean_squared_error_of_the_outputs():
    x, error = torch.randn(200, 16), torch.randn(5, 16)
    expected = (x @ error.T).square().sum(1).mean()
    assert Moments.of([x]).loss(error) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(bad):
    x = torch.ones(10, 4)
    x[3, 2] = bad
    with pytest.raises(NotFiniteError, match="not finite"):
        Moments.of([x])
