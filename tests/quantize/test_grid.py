"""Grids of codes: what they hold, and that the fitted one is the best of what was tried."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvant.errors import UnsupportedModelError
from kvant.quantize.grid import Grid, GridSpec

SPECS = st.builds(
    GridSpec,
    bits=st.sampled_from((4, 8)),
    group_size=st.sampled_from((16, 32)),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32)),
)
WEIGHTS = st.builds(
    lambda rows, groups, seed, offset: (
        torch.randn(rows, groups * 32, generator=torch.Generator().manual_seed(seed)) + offset
    ),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 1000),
    st.sampled_from((0.0, 3.0, -3.0)),
)


@settings(max_examples=60, deadline=None)
@given(spec=SPECS, weight=WEIGHTS)
def test_a_packed_weight_has_the_values_of_the_grid(spec, weight):
    for grid in (Grid.plain(spec, weight), Grid.fitted(spec, weight)):
        codes = grid.codes(weight)
        assert codes.amin() >= 0
        assert codes.amax() <= spec.top
        packed = grid.pack(codes)
        assert packed.bits == spec.bits
        assert ("zero" in packed.planes) != spec.symmetric
        assert packed.planes["scale"].data.dtype == spec.scale_dtype
        torch.testing.assert_close(packed.dequantize(torch.float32), grid.values(codes), rtol=0, atol=0)


@settings(max_examples=60, deadline=None)
@given(spec=SPECS, weight=WEIGHTS)
def test_a_plain_grid_reaches_every_value(spec, weight):
    grid = Grid.plain(spec, weight)
    error = (grid.round(weight) - weight).abs().unflatten(1, (-1, spec.group_size)).amax(-1)
    # Half a step, another half where the zero point or the symmetric end was rounded, and the scale's own rounding.
    assert (error <= grid.scale.abs() * 1.01 + 2**-8 * weight.abs().amax()).all()


@settings(max_examples=60, deadline=None)
@given(spec=SPECS, weight=WEIGHTS, seed=st.integers(0, 100))
def test_a_fitted_grid_is_never_worse_where_it_counts(spec, weight, seed):
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(seed)) ** 4

    def loss(grid):
        error = (grid.round(weight) - weight).square() * importance
        return error.unflatten(1, (-1, spec.group_size)).sum(-1)

    assert (loss(Grid.fitted(spec, weight, importance)) <= loss(Grid.plain(spec, weight)) * (1 + 1e-5) + 1e-12).all()


def test_zero_stays_zero():
    weight = torch.randn(4, 64) + 5
    weight[:, ::7] = 0
    for symmetric in (False, True):
        grid = Grid.fitted(GridSpec(4, 32, symmetric), weight)
        assert (grid.round(weight)[:, ::7] == 0).all()
    assert (Grid.fitted(GridSpec(4, 32, False), torch.zeros(2, 32)).round(torch.zeros(2, 32)) == 0).all()


def test_a_symmetric_grid_uses_its_far_end_where_that_is_better():
    weight = torch.linspace(-8, 7, 16).repeat(2).unsqueeze(0) / 8
    grid = Grid.fitted(GridSpec(4, 32, True), weight)
    assert torch.equal(grid.round(weight), weight)
    # The other way round, the scale is negative.
    assert torch.equal(Grid.fitted(GridSpec(4, 32, True), -weight).round(-weight), -weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_what_no_scale_can_hold_is_refused(bad):
    weight = torch.randn(2, 32)
    weight[0, 3] = bad
    grid = Grid.plain(GridSpec(4, 32, False), weight)
    with pytest.raises(UnsupportedModelError, match="cannot be quantized"):
        grid.pack(grid.codes(weight))
