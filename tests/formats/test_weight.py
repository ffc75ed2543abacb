"""`PackedWeight`: slicing and fusing, shown on a made-up 4-bit format in groups, against the matrix it stands for."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from kvant.errors import CorruptModelError
from kvant.formats.weight import PackedWeight, WeightPlane

GROUP = 4


def packed(outputs: int, inputs: int, seed: int) -> PackedWeight:
    """Two 4-bit codes a byte and a scale for each group of 4 inputs."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (outputs, inputs // 2), generator=generator, dtype=torch.uint8)
    scales = torch.randn(outputs, inputs // GROUP, generator=generator)
    return PackedWeight("toy", inputs, {"q": WeightPlane(codes, 2), "scale": WeightPlane(scales, GROUP)})


def matrix(weight: PackedWeight) -> Tensor:
    """What the planes mean: [out_features, in_features]."""
    if weight.format == "dense":
        return weight.planes["weight"].data
    codes = weight.planes["q"].data
    wide = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).float()
    return wide * weight.planes["scale"].data.repeat_interleave(GROUP, dim=1)


def make(kind: str, outputs: int, inputs: int, seed: int) -> PackedWeight:
    dense = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return PackedWeight.dense(dense) if kind == "dense" else packed(outputs, inputs, seed)


KINDS = st.sampled_from(("dense", "toy"))
SIZES = st.integers(1, 6)


@given(kind=KINDS, outputs=SIZES, groups=SIZES, seed=st.integers(0, 99), data=st.data())
def test_slices_are_slices_of_the_matrix(kind, outputs, groups, seed, data):
    weight = make(kind, outputs, groups * GROUP, seed)
    whole = matrix(weight)
    assert (weight.out_features, weight.in_features) == whole.shape
    start, stop = sorted((data.draw(st.integers(0, groups)), data.draw(st.integers(0, groups))))
    part = weight.columns(start * GROUP, stop * GROUP)
    assert part.in_features == (stop - start) * GROUP
    assert torch.equal(matrix(part), whole[:, start * GROUP : stop * GROUP])
    first, last = sorted((data.draw(st.integers(0, outputs)), data.draw(st.integers(0, outputs))))
    assert torch.equal(matrix(weight.rows(slice(first, last))), whole[first:last])
    order = torch.tensor(data.draw(st.permutations(range(outputs))))
    shuffled = weight.rows(order)
    assert torch.equal(matrix(shuffled), whole[order])
    assert torch.equal(matrix(shuffled.columns(start * GROUP, stop * GROUP)), matrix(part.rows(order)))
    assert torch.equal(matrix(weight), whole), "slicing changed the weight it was taken from"


@given(kind=KINDS, outputs=st.lists(SIZES, min_size=1, max_size=4), groups=SIZES, seed=st.integers(0, 99))
def test_fused_parts_come_apart_again(kind, outputs, groups, seed):
    parts = [make(kind, n, groups * GROUP, seed + i) for i, n in enumerate(outputs)]
    fused = PackedWeight.concat(parts)
    assert fused.out_features == sum(outputs)
    assert torch.equal(matrix(fused), torch.cat([matrix(part) for part in parts]))
    start = 0
    for part in parts:
        again = fused.rows(slice(start, start + part.out_features))
        assert (again.format, again.in_features) == (part.format, part.in_features)
        assert all(torch.equal(again.planes[name].data, plane.data) for name, plane in part.planes.items())
        assert {name: p.span for name, p in again.planes.items()} == {name: p.span for name, p in part.planes.items()}
        start += part.out_features


def test_a_dense_weight_is_its_matrix():
    data = torch.ones(3, 5, dtype=torch.bfloat16)
    weight = PackedWeight.dense(data)
    assert weight.planes["weight"].data is data
    assert (weight.format, weight.planes["weight"].span) == ("dense", 1)


@pytest.mark.parametrize("cut", [(0, 2), (2, 8), (1, 3)])
def test_a_group_is_never_cut(cut):
    with pytest.raises(ValueError, match=f"columns {cut[0]}:{cut[1]} cut through a group of"):
        packed(2, 8, 0).columns(*cut)


def test_only_alike_weights_are_fused():
    for other in (packed(2, 12, 0), PackedWeight.dense(torch.zeros(2, 8))):
        with pytest.raises(CorruptModelError, match="differ in format or input width"):
            PackedWeight.concat([packed(2, 8, 0), other])
