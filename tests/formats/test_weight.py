"""`PackedWeight`: slicing and fusing, against the matrix that a weight stands for."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from kvant.errors import CorruptModelError
from kvant.formats.weight import BLOCK, BLOCK_BITS, InputCodes, PackedWeight, pair

WIDTH = 8  # every group below divides it


def codes_and_weight(
    bits: int, outputs: int, inputs: int, seed: int, *, group: int = 4, biased: bool = False, size: float = 1.0
) -> tuple[Tensor, PackedWeight]:
    """Random codes [N, K] and the weight that has them, its scales about `size`."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scale, bias = ((torch.randn(outputs, inputs // group, generator=generator) * size).half() for _ in range(2))
    return codes, PackedWeight.quantized(bits, pair(codes) if bits == 4 else codes, scale, bias if biased else None)


def make(kind: str, outputs: int, inputs: int, seed: int) -> PackedWeight:
    if kind == "dense":
        return PackedWeight.dense(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)))
    bits, group, biased = int(kind[3]), int(kind[5]), kind.endswith("+bias")
    weight = codes_and_weight(bits, outputs, inputs, seed, group=group, biased=biased)[1]
    return with_zeros(weight, seed) if kind.endswith("+zero") else weight


def with_zeros(weight: PackedWeight, seed: int) -> PackedWeight:
    scale = weight.planes["scale"]
    generator = torch.Generator().manual_seed(seed)
    zero = torch.randint(0, 2**weight.bits, scale.data.shape, generator=generator, dtype=torch.uint8)
    return replace(weight, planes=weight.planes | {"zero": replace(scale, data=zero)})


def in_order(weight: PackedWeight, seed: int) -> PackedWeight:
    """The same planes, whose columns are other inputs'."""
    order = torch.randperm(weight.in_features, generator=torch.Generator().manual_seed(seed))
    return replace(weight, order=order)


def matrix(weight: PackedWeight) -> Tensor:
    """What the planes mean, element by element."""
    if weight.format == "dense":
        return weight.planes["weight"].data
    names = ("q", "scale", "bias", "zero")
    q, scale, bias, zeros = (weight.planes[name].data if name in weight.planes else None for name in names)
    bits, group = int(weight.format.removeprefix("int")), weight.planes["scale"].span
    values = torch.empty(q.shape[0], q.shape[1] * 8 // bits)
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            code = int(q[row, column]) if bits == 8 else int(q[row, column // 2]) >> 4 * (column % 2) & 15
            step = float(scale[row, column // group])
            middle = 2 ** (bits - 1) if zeros is None else int(zeros[row, column // group])
            zero = -middle * step if bias is None else float(bias[row, column // group])
            at = column if weight.order is None else int(weight.order[column])
            values[row, at] = code * step + zero
    return values


NAMES = ("dense", "int4/2", "int4/4+bias", "int4/8", "int4/4+zero", "int8/1", "int8/2+bias", "int8/8", "int8/8+zero")
KINDS = st.sampled_from(NAMES)
SIZES = st.integers(1, 4)


@given(kind=KINDS, outputs=SIZES, groups=SIZES, seed=st.integers(0, 99), data=st.data())
def test_slices_are_slices_of_the_matrix(kind, outputs, groups, seed, data):
    weight = make(kind, outputs, groups * WIDTH, seed)
    whole = matrix(weight)
    assert (weight.out_features, weight.in_features) == whole.shape
    assert torch.equal(weight.dequantize(torch.float32), whole)
    start, stop = sorted((data.draw(st.integers(0, groups)), data.draw(st.integers(0, groups))))
    part = weight.columns(start * WIDTH, stop * WIDTH)
    assert part.in_features == (stop - start) * WIDTH
    assert torch.equal(part.dequantize(torch.float32), whole[:, start * WIDTH : stop * WIDTH])
    first, last = sorted((data.draw(st.integers(0, outputs)), data.draw(st.integers(0, outputs))))
    assert torch.equal(weight.rows(slice(first, last)).dequantize(torch.float32), whole[first:last])
    order = torch.tensor(data.draw(st.permutations(range(outputs))))
    shuffled = weight.rows(order)
    assert torch.equal(matrix(shuffled), whole[order])
    assert torch.equal(matrix(shuffled.columns(start * WIDTH, stop * WIDTH)), matrix(part.rows(order)))
    assert torch.equal(matrix(weight), whole), "slicing changed the weight it was taken from"


@given(kind=KINDS, outputs=st.lists(SIZES, min_size=1, max_size=4), groups=SIZES, seed=st.integers(0, 99))
def test_fused_parts_come_apart_again(kind, outputs, groups, seed):
    parts = [make(kind, n, groups * WIDTH, seed + i) for i, n in enumerate(outputs)]
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


@given(kinds=st.lists(KINDS, min_size=2, max_size=4), outputs=SIZES, seed=st.integers(0, 99))
def test_parts_of_different_formats_keep_their_values(kinds, outputs, seed):
    parts = [make(kind, outputs, 2 * WIDTH, seed + i) for i, kind in enumerate(kinds)]
    fused = PackedWeight.concat(parts)
    assert torch.equal(matrix(fused), torch.cat([matrix(part) for part in parts]))
    mixed = {"bias", "zero"} <= {name for part in parts for name in part.planes}
    if "dense" in kinds or mixed:  # a zero point as a bias would be rounded
        assert fused.format == "dense"
    else:
        assert ("zero" in fused.planes) == any("zero" in part.planes for part in parts)
        assert fused.bits == max(part.bits for part in parts)
        assert fused.group_size == min(part.group_size for part in parts)
        assert ("bias" in fused.planes) == any("bias" in part.planes for part in parts)


@given(
    bits=st.sampled_from((4, 8)),
    columns=st.integers(2, 16).map(lambda n: 2 * n),
    group=st.sampled_from((2, 4, 6, 8)),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_last_group_of_a_row_may_be_smaller(bits, columns, group, biased, seed):
    groups = -(-columns // group)
    whole = codes_and_weight(bits, 3, groups * group, seed, group=group, biased=biased)[1]
    planes = {name: plane.data for name, plane in whole.planes.items()}
    q = planes["q"][:, : columns * bits // 8]
    weight = PackedWeight.quantized(bits, q, planes["scale"], planes.get("bias"), group_size=group)
    assert torch.equal(weight.dequantize(torch.float32), matrix(whole)[:, :columns])
    assert torch.equal(matrix(weight.columns(group, columns)), matrix(whole)[:, group:columns])
    assert torch.equal(matrix(weight.regrouped(2)), matrix(weight))
    finer = codes_and_weight(bits, 2, columns, seed + 1, group=2)[1]
    assert torch.equal(matrix(PackedWeight.concat([weight, finer])), torch.cat([matrix(weight), matrix(finer)]))


@given(kind=st.sampled_from(NAMES[1:]), seed=st.integers(0, 99))
def test_columns_may_be_stored_in_another_order(kind, seed):
    weight = in_order(make(kind, 3, 2 * WIDTH, seed), seed)
    assert torch.equal(weight.dequantize(torch.float32), matrix(weight))
    other = replace(make(kind, 2, 2 * WIDTH, seed + 1), order=weight.order)
    fused = PackedWeight.concat([weight, other])
    assert fused.format == weight.format
    assert torch.equal(matrix(fused), torch.cat([matrix(weight), matrix(other)]))
    mixed = PackedWeight.concat([weight, replace(other, order=None)])
    assert torch.equal(matrix(mixed), torch.cat([matrix(weight), matrix(replace(other, order=None))]))
    with pytest.raises(ValueError, match="not stored in order"):
        weight.columns(0, WIDTH)


def test_fused_parts_that_round_their_inputs_go_on_doing_so():
    plain = make("int8/8", 2, WIDTH, 0)
    dynamic = replace(plain, inputs=InputCodes())
    assert PackedWeight.concat([dynamic, dynamic]).inputs == InputCodes()
    low, high = (replace(plain, inputs=InputCodes(torch.tensor([scale]))) for scale in (0.1, 0.2))
    assert PackedWeight.concat([low, high]).inputs.scale.item() == pytest.approx(0.2)
    for other in (plain, low, PackedWeight.dense(torch.ones(2, WIDTH))):
        fused = PackedWeight.concat([dynamic, other])
        assert fused.inputs is None
        assert torch.equal(matrix(fused), torch.cat([matrix(dynamic), matrix(other)]))


def test_a_bias_beyond_float16_makes_fused_parts_dense():
    huge, biased = codes_and_weight(8, 2, 8, 0, size=1e3)[1], codes_and_weight(8, 2, 8, 1, biased=True)[1]
    fused = PackedWeight.concat([huge, biased])
    assert fused.format == "dense"
    assert torch.equal(matrix(fused), torch.cat([matrix(huge), matrix(biased)]))
    assert PackedWeight.concat([huge, huge]).format == "int8"


def test_beside_a_dense_part_all_take_its_dtype():
    packed = codes_and_weight(4, 2, 8, 0)[1]
    fused = PackedWeight.concat([packed, PackedWeight.dense(torch.ones(2, 8, dtype=torch.bfloat16))])
    assert torch.equal(matrix(fused)[:2], matrix(packed).bfloat16())


def test_a_dense_weight_is_its_matrix():
    data = torch.ones(3, 5, dtype=torch.bfloat16)
    weight = PackedWeight.dense(data)
    assert weight.planes["weight"].data is data
    assert weight.dequantize(torch.bfloat16) is data
    assert torch.equal(weight.dequantize(torch.float32), data.float())
    assert (weight.format, weight.bits, weight.group_size, weight.nbytes) == ("dense", 16, 1, 30)


def in_blocks(kind: str, outputs: int, groups: int, seed: int) -> PackedWeight:
    """Blocks of random codes, their scales and biases about 1."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (outputs, groups, BLOCK * BLOCK_BITS[kind] // 8), generator=generator).byte()
    numbers = torch.randn(outputs, groups, 2 if kind == "q4_1" else 1, generator=generator).half().view(torch.uint8)
    return PackedWeight.in_blocks(kind, torch.cat([numbers, codes], dim=2))


@pytest.mark.parametrize("kind", BLOCK_BITS)
@given(outputs=SIZES, groups=SIZES, seed=st.integers(0, 99), data=st.data())
def test_blocks_are_sliced_and_fused_as_their_planes_are(kind, outputs, groups, seed, data):
    weight = in_blocks(kind, outputs, groups, seed)
    whole = matrix(weight.planar())
    assert torch.equal(weight.dequantize(torch.float32), whole)
    assert (weight.bits, weight.group_size, weight.nbytes) == (BLOCK_BITS[kind], BLOCK, weight.planar().nbytes)
    start, stop = sorted((data.draw(st.integers(0, groups)), data.draw(st.integers(0, groups))))
    part = weight.columns(start * BLOCK, stop * BLOCK)
    assert torch.equal(part.dequantize(torch.float32), whole[:, start * BLOCK : stop * BLOCK])
    order = torch.tensor(data.draw(st.permutations(range(outputs))))
    assert torch.equal(weight.rows(order).dequantize(torch.float32), whole[order])
    again = PackedWeight.concat([weight, weight.rows(order)])
    assert again.format == kind
    assert torch.equal(again.dequantize(torch.float32), torch.cat([whole, whole[order]]))


@pytest.mark.parametrize("kind", BLOCK_BITS)
@pytest.mark.parametrize("other", [*BLOCK_BITS, "int4/8", "int8/2+bias", "dense"])
def test_blocks_beside_other_formats_keep_their_values(kind, other):
    weight = in_blocks(kind, 3, 2, seed=0)
    beside = in_blocks(other, 2, 2, seed=1) if other in BLOCK_BITS else make(other, 2, 2 * BLOCK, seed=1)
    expected = torch.cat([matrix(weight.planar()), matrix(beside.planar())])
    assert torch.equal(PackedWeight.concat([weight, beside]).dequantize(torch.float32), expected)


@pytest.mark.parametrize("kind", BLOCK_BITS)
def test_blocks_are_scaled_and_regrouped_by_their_planes(kind):
    weight, factors = in_blocks(kind, 3, 2, seed=0), torch.tensor([0.5, 2.0, -1.0])
    assert torch.equal(matrix(weight.times(factors)), matrix(weight.planar()) * factors.unsqueeze(1))
    assert torch.equal(matrix(weight.regrouped(16)), matrix(weight.planar()))


@pytest.mark.parametrize(("bits", "biased", "nbytes"), [(4, False, 8 + 8), (8, False, 16 + 8), (4, True, 8 + 16)])
def test_a_quantized_weight_knows_its_size(bits, biased, nbytes):
    weight = codes_and_weight(bits, 2, 8, 0, biased=biased)[1]
    assert (weight.format, weight.bits, weight.group_size, weight.nbytes) == (f"int{bits}", bits, 4, nbytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_once(dtype):
    """From float32, whatever the size: many rows are expanded in more than one piece."""
    codes, weight = codes_and_weight(4, 600, 512, 0, group=32, biased=True)
    scale, bias = (weight.planes[name].data.float().repeat_interleave(32, dim=1) for name in ("scale", "bias"))
    assert torch.equal(weight.dequantize(dtype), (codes * scale + bias).to(dtype))


@pytest.mark.parametrize("cut", [(0, 2), (2, 8), (1, 3)])
def test_a_group_is_never_cut(cut):
    with pytest.raises(ValueError, match=f"columns {cut[0]}:{cut[1]} cut through a group of"):
        codes_and_weight(4, 2, 8, 0)[1].columns(*cut)


def test_only_weights_of_one_width_are_fused():
    with pytest.raises(CorruptModelError, match="differ in input width"):
        PackedWeight.concat([codes_and_weight(4, 2, 8, 0)[1], codes_and_weight(4, 2, 12, 0)[1]])
