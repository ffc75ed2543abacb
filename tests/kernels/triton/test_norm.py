"""Norms where the parity test does not look: strided heads, real widths, and rows rounded for W8A8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from kvant.formats.weight import InputCodes
from kvant.kernels.reference import ReferenceOps, rounded_inputs
from kvant.kernels.triton import norm
from kvant.kernels.triton.ops import TritonOps
from kvant.quantize.rtn import rtn

REFERENCE = ReferenceOps()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (3, 96), (5, 128)])
def test_heads_are_normed_where_they_lie(heads, dim):
    projected, weight = random(7, heads + 4, dim), random(dim)
    for x in (projected[:, :heads], projected[:, 2 : 2 + heads]):
        torch.testing.assert_close(norm.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("width", [896, 4096, 5120])
def test_rows_of_real_widths(width):
    x, residual, weight = random(3, width), random(4, width)[1:], random(width)
    found, expected = norm.add_rms_norm(x, residual, weight, 1e-6), REFERENCE.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(found, expected)


def test_no_rows():
    assert norm.rms_norm(random(0, 16), random(16), 1e-6).shape == (0, 16)


@pytest.mark.parametrize("measured", [None, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounded_rows_are_what_the_reference_rounds_to(dtype, measured):
    x, residual, weight = random(6, 200, dtype=dtype), random(7, 200, dtype=dtype)[1:], random(200)
    x[2], residual[2] = 0, 0  # a row whose scale is 0
    inputs = InputCodes(None if measured is None else torch.tensor([measured]))
    normed, total = REFERENCE.add_rms_norm(x, residual, weight, 1e-5)
    found, added = norm.rounded_add_rms_norm(x, residual, weight, 1e-5, inputs)
    assert torch.equal(added, total)
    assert found.codes.abs().max() <= 127
    largest = normed.float().abs().amax(-1) / 127
    torch.testing.assert_close(
        found.scales,
        largest if measured is None else torch.full_like(largest, measured),
        rtol=torch.finfo(dtype).eps * 2,
        atol=0,
    )
    step = found.scales.unsqueeze(1)
    values, expected = found.codes * step, rounded_inputs(normed, inputs).float()
    # A norm that is off by a rounding lets a code differ where it was at a tie.
    assert ((values - expected).abs() <= step * 1.01 + expected.abs() * torch.finfo(dtype).eps).all()
    assert ((values - normed.float()).abs() <= step * 0.51)[found.codes.abs() < 127].all()


@pytest.mark.parametrize("measured", [None, 0.02])
def test_a_weight_that_takes_codes_gets_them_from_the_norm(measured):
    inputs = InputCodes(None if measured is None else torch.tensor([measured]))
    ops = TritonOps()
    reader = ops.prepare(replace(rtn(random(24, 200), 8, 200), inputs=inputs))
    x, residual, weight, bias = random(5, 200), random(6, 200)[1:], random(200), random(24)
    found, _ = ops.add_rms_norm(x, residual, weight, 1e-5, reader)
    plain, _ = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert isinstance(found, norm.Rounded)
    torch.testing.assert_close(ops.linear(found, reader, bias), ops.linear(plain, reader, bias))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_has_no_scale(bad):
    x = random(4, 64)
    x[1, 3] = bad
    found, _ = norm.rounded_add_rms_norm(x, torch.zeros_like(x), random(64), 1e-5, InputCodes())
    assert found.scales.isnan().tolist() == [False, True, False, False]
