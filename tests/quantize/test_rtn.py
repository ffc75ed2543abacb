"""Rounding weights to nearest, against a search over every scale and what a group can hold."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kvant.config import WEIGHT_GROUP_SIZES
from kvant.errors import ConfigError, UnsupportedModelError
from kvant.quantize.rtn import rtn

BITS = st.sampled_from((4, 8))
GROUPS = st.sampled_from(WEIGHT_GROUP_SIZES)


def random(seed: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_group(x: Tensor, group: int) -> Tensor:
    return x.unflatten(1, (-1, group))


@settings(max_examples=40)
@given(
    bits=BITS,
    group=GROUPS,
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    size=st.sampled_from((1e-6, 1e-3, 1.0, 1e4)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    seed=st.integers(0, 999),
)
def test_every_element_takes_the_nearest_step(bits, group, rows, groups, size, dtype, seed):
    weight = (random(seed, rows, groups * group) * size).to(dtype)
    packed = rtn(weight, bits, group)
    assert (packed.format, packed.group_size, packed.in_features) == (f"int{bits}", group, groups * group)
    assert set(packed.planes) == {"q", "scale"}
    scale = packed.planes["scale"].data.double().unsqueeze(-1)
    x, found = (by_group(values.double(), group) for values in (weight, packed.dequantize(torch.float32)))
    ends = torch.stack([-(2 ** (bits - 1)) * scale, (2 ** (bits - 1) - 1) * scale])
    low, high = ends.amin(0), ends.amax(0)
    error = (found - x.clamp(low, high)).abs()
    assert (error <= scale.abs() * (0.5 + 1e-5) + 1e-12).all()


@settings(max_examples=20)
@given(group=GROUPS, outlier=st.sampled_from((1.0, 4.0, -6.0)), seed=st.integers(0, 999))
def test_4_bit_scales_are_nearly_the_best(group, outlier, seed):
    """The error of all groups together is at most 4% above that of the best of many scales a group."""
    weight = random(seed, 64, group)
    weight[:, 3] *= outlier
    error = (rtn(weight, 4, group).dequantize(torch.float32) - weight).square().sum()
    largest = weight.abs().amax(1, keepdim=True)
    least = torch.full((64,), torch.inf)
    for reach in torch.linspace(6, 14, 200):
        for scale in (largest / reach, -largest / reach):
            codes = (weight / scale).round().clamp(-8, 7)
            least = torch.minimum(least, (codes * scale - weight).square().sum(1))
    assert error <= 1.04 * least.sum()


def test_8_bits_reach_from_one_end_to_the_other():
    weight = torch.linspace(-127, 127, 64).unsqueeze(0)
    packed = rtn(weight, 8, 64)
    assert packed.planes["scale"].data.item() == 1
    assert packed.planes["q"].data.tolist() == (weight.round() + 128).int().tolist()


@pytest.mark.parametrize("bits", [4, 8])
def test_large_weights_are_rounded_in_pieces(bits):
    weight = random(0, 700, 512)
    whole = rtn(weight, bits, 32)
    for rows in (slice(0, 1), slice(255, 257), slice(699, 700)):
        alone = rtn(weight[rows], bits, 32)
        assert all(torch.equal(alone.planes[name].data, whole.rows(rows).planes[name].data) for name in alone.planes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1e-9])
def test_what_no_scale_can_hold_is_zero(bits, value):
    assert not rtn(torch.full((2, 32), value), bits, 32).dequantize(torch.float32).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_on_the_grid_stays(bits):
    """Rounding the rounded values again gives them back, up to float16 scales."""
    once = rtn(random(0, 8, 128), bits, 32).dequantize(torch.float32)
    again = rtn(once, bits, 32).dequantize(torch.float32)
    torch.testing.assert_close(again, once, atol=0.0, rtol=2e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 1e9])
def test_values_that_no_float16_scale_reaches_are_refused(bits, bad):
    weight = random(0, 4, 64)
    weight[2, 40] = bad
    with pytest.raises(UnsupportedModelError, match="not finite, or too large.*use weights='dense'"):
        rtn(weight, bits, 32)


@pytest.mark.parametrize(
    ("columns", "group", "remedy"),
    [(576, 128, "weights_group_size=64"), (96, 64, "weights_group_size=32"), (48, 32, "weights='auto'")],
)
def test_groups_must_divide_the_inputs(columns, group, remedy):
    with pytest.raises(ConfigError, match=f"{columns} inputs cannot be cut into groups of {group}; use {remedy}"):
        rtn(torch.zeros(2, columns), 4, group)
