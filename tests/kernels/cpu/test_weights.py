"""Which forms of quantized weights the kernels have loops for: the memory that is left of them tells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvant.errors import CorruptModelError
from kvant.formats.weight import BLOCK_BITS, InputCodes, PackedWeight, pair
from kvant.kernels.cpu.structs import KINDS


def made_up(bits: int, columns: int, group: int, rows: int = 16, **planes: torch.Tensor) -> PackedWeight:
    generator = torch.Generator().manual_seed(columns)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, -(-columns // group), generator=generator) + 0.1
    q = pair(codes) if bits == 4 else codes
    return PackedWeight.quantized(bits, q, scale, group_size=group, **planes)


@pytest.mark.parametrize(
    ("columns", "group", "expected"),
    [
        (256, 16, 16), (256, 48, 16), (192, 96, 32), (896, 448, 64), (4864, 2432, 128), (200, 64, 64), (72, 32, 32),
        # One group a row ends where the row does: it is not cut.
        (896, 896, 1024), (4864, 4864, 8192), (48, 48, 64), (16, 16, 32), (64, 128, 64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_are_cut_to_the_largest_that_fits(native, columns, group, expected, bits):
    prepared = native(1).prepare(made_up(bits, columns, group))
    assert (prepared.struct.kind, prepared.struct.group) == (KINDS[f"int{bits}"], expected)
    assert prepared.shape == (16, columns)


@pytest.mark.parametrize(
    "weight",
    [
        made_up(4, 64, 24),
        made_up(4, 64, 8),
        replace(made_up(8, 64, 64), planes={**made_up(8, 64, 32).planes, "scale": made_up(8, 64, 1).planes["scale"]}),
        made_up(4, 64, 32, bias=torch.full((16, 2), torch.inf)),
    ],
    ids=["24", "8", "1", "bias"],
)
def test_the_others_become_float32(native, weight):
    assert native(1).prepare(weight).struct.kind == KINDS["float32"]


@pytest.mark.parametrize("size", [1e-9, 1e6, float("nan")])
def test_scales_that_float16_does_not_hold_become_float32(native, size):
    weight = made_up(8, 64, 32)
    scale = weight.planes["scale"]
    scaled = replace(weight, planes=weight.planes | {"scale": replace(scale, data=scale.data * size)})
    assert native(1).prepare(scaled).struct.kind == KINDS["float32"]


def test_a_few_tiny_scales_among_others_are_rounded(native):
    weight = made_up(8, 64, 32)
    weight.planes["scale"].data[3] = 1e-9
    assert native(1).prepare(weight).struct.kind == KINDS["int8"]


def test_zero_points_cost_memory_only_where_they_say_something(native):
    middle = torch.full((16, 2), 8, dtype=torch.uint8)
    plain, told, other = (
        sum(part.nbytes for part in native(1).prepare(made_up(4, 64, 32, **planes)).memory.values())
        for planes in ({}, {"zero": middle}, {"zero": middle + 1})
    )
    assert (told, other) == (plain, plain + 32)


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (13, 3), (520, 2)])
@pytest.mark.parametrize("kind", BLOCK_BITS)
def test_blocks_are_packed_as_their_planes_are(native, kind, rows, groups):
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, (rows, groups, 32 * BLOCK_BITS[kind] // 8), generator=generator).byte()
    numbers = torch.randn(rows, groups, 2 if kind == "q4_1" else 1, generator=generator).half().view(torch.uint8)
    weight = PackedWeight.in_blocks(kind, torch.cat([numbers, codes], dim=2))
    for threads in (1, 2):
        found, expected = (native(threads).prepare(one) for one in (weight, weight.planar()))
        assert (found.kind, found.shape, found.struct.group) == (expected.kind, expected.shape, expected.struct.group)
        assert found.memory.keys() == expected.memory.keys()
        assert all(torch.equal(found.memory[name], data) for name, data in expected.memory.items())


def test_inputs_that_are_to_be_rounded_change_nothing(native):
    """The kernels round them 32 together."""
    ops, weight, x = native(1), made_up(8, 96, 32), torch.randn(5, 96)
    expected = ops.linear(x, ops.prepare(weight))
    for scale in (None, torch.tensor([0.02])):
        assert torch.equal(ops.linear(x, ops.prepare(replace(weight, inputs=InputCodes(scale)))), expected)


@pytest.mark.parametrize("order", [[0, 0, *range(2, 32)], [*range(1, 33)], [-1, *range(31)]])
def test_an_order_that_is_none_is_refused(native, order):
    with pytest.raises(CorruptModelError, match="does not name each of them once"):
        native(1).prepare(replace(made_up(4, 32, 32), order=torch.tensor(order)))


@pytest.mark.parametrize("columns", [96, 200, 384])
@pytest.mark.parametrize("group", [32, 64, 128, 8192])
@pytest.mark.parametrize("rows", [30, 64])
def test_tokens_together_have_the_products_that_each_has_alone(native, rows, columns, group):
    """Tiles of any height, whose last rows are no whole block, with inputs of which some are far above the others."""
    ops = native(1)
    weight = made_up(4, columns, min(group, columns), rows)
    weight.planes["scale"].data.mul_(torch.tensor([1.0, -1.0]).repeat(rows // 2)[:, None])
    prepared, matrix = ops.prepare(weight), weight.dequantize(torch.float32).abs()
    x = torch.randn(12, columns, generator=torch.Generator().manual_seed(columns))
    x[3, 40] = 300
    alone = torch.cat([ops.linear(row, prepared) for row in x.split(1)])
    for tokens in range(2, 13):
        error = (ops.linear(x[:tokens], prepared) - alone[:tokens]).abs()
        assert (error <= 1e-5 * (x[:tokens].abs() @ matrix.T)).all()
