"""AWQ, GPTQ, SmoothQuant, RTN and auto on layers whose inputs are like a model's."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvant.errors import UnsupportedModelError
from kvant.kernels.reference import ReferenceOps
from kvant.quantize.awq import awq_scales, tied
from kvant.quantize.gptq import gptq
from kvant.quantize.grid import Grid, GridSpec
from kvant.quantize.methods import METHODS
from kvant.quantize.moments import Moments
from tests.quantize.problems import W4, inputs, problem, unseen, weight

W8A8 = GridSpec(bits=8, group_size=128, symmetric=True)


def error(name, case):
    """On text that no method has seen."""
    return METHODS[name](case).error(case, unseen())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 128])
def test_each_method_beats_rounding_to_nearest(group, symmetric):
    case = problem(spec=GridSpec(4, group, symmetric))
    plain = error("plain", case)
    assert error("rtn", case) < plain
    assert error("awq", case) < plain
    assert error("gptq", case) < 0.7 * plain


@pytest.mark.parametrize("foldable", [True, False])
def test_auto_is_as_good_as_the_best(foldable):
    case = problem(foldable=foldable)
    best = min(error(name, case) for name in ("rtn", "awq", "gptq"))
    assert error("auto", case) <= best * 1.001


@pytest.mark.parametrize("foldable", [True, False])
def test_auto_chooses_by_a_text_that_was_not_seen_and_then_sees_it(foldable):
    """The methods that are compared know `others` only; the result is the chosen method's own, with all of the text."""
    part, compared = Moments.of([inputs(100, 128)]), []

    def harm(solution):
        return float(solution.method != "gptq")

    def noted(solution):
        compared.append(solution)
        return harm(solution)

    case = replace(problem(foldable=foldable), harm=harm)
    found = METHODS["auto"](replace(case, others=lambda: part, harm=noted))
    all_of_it, held_out = (METHODS["gptq"](replace(case, inputs=it)) for it in (case.inputs, part))
    assert torch.equal(found.weight.codes, all_of_it.weight.codes)
    assert not torch.equal(found.weight.codes, held_out.weight.codes)
    first = next(it for it in compared if it.method == "gptq")
    assert torch.equal(first.weight.codes, held_out.weight.codes)


def test_factors_are_of_use_only_where_inputs_can_be_divided():
    assert METHODS["awq"](problem()).scale is not None
    assert METHODS["awq"](problem(foldable=False)).scale is None


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["rtn", "gptq"])
def test_ranges_are_clipped_only_where_that_does_less_harm(name, symmetric):
    """A weight's own errors are smallest with clipped ranges; what they do to the model may be another matter."""
    case = problem(spec=GridSpec(4, 32, symmetric))

    def width(solution):
        return float(solution.weight.planes["scale"].data.abs().float().mean())

    narrow = METHODS[name](replace(case, harm=width))
    wide = METHODS[name](replace(case, harm=lambda it: -width(it)))
    assert width(narrow) < 0.95 * width(wide)
    ends = case.weight.unflatten(1, (-1, 32)).abs().amax(-1)
    reached = wide.weight.dequantize(torch.float32).unflatten(1, (-1, 32)).abs().amax(-1)
    assert (reached > 0.8 * ends).all() or name == "gptq"  # whose weights have changed when they are rounded


def gptq_by_the_paper(w, second, spec, damping=0.01):
    """Frantar et al. 2023, algorithm 1, one weight at a time, in float64; columns in the order of `_visiting_order`."""
    importance = second.diagonal()
    groups = importance.view(-1, spec.group_size)
    order = [
        int(g) * spec.group_size + int(c)
        for g in groups.sum(1).argsort(descending=True)
        for c in groups[g].argsort(descending=True)
    ]
    h = second[order][:, order].double()
    h += damping * h.diagonal().mean() * torch.eye(len(h))
    inverse, w = torch.linalg.inv(h), w[:, order].double()
    q = torch.zeros_like(w)
    for i in range(len(order)):
        if i % spec.group_size == 0:
            block = slice(i, i + spec.group_size)
            factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
            grid = Grid.fitted(spec, w[:, block].float(), (1 / factor.diagonal()[block] ** 2).float())
            scale, zero = grid.scale[:, 0].double(), grid.zero[:, 0].double()
        code = (w[:, i] / scale + zero).round().clamp(0, spec.top)
        q[:, i] = (code - zero) * scale
        # Eliminate what is fixed now from the inverse of the rest.
        share = inverse[i, i:] / inverse[i, i]
        w[:, i:] -= (w[:, i] - q[:, i]).unsqueeze(1) * share
        inverse[i:, i:] -= torch.outer(inverse[i:, i], inverse[i, i:]) / inverse[i, i]
    out = torch.zeros_like(q)
    out[:, order] = q
    return out


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_is_the_algorithm_of_the_paper(symmetric):
    spec = GridSpec(4, 32, symmetric)
    w, moments = weight(12, 96), Moments.of([inputs(300, 96)])
    found = gptq(w, moments, spec).dequantize(torch.float64)
    expected = gptq_by_the_paper(w, moments.second, spec)
    # Where a value lies between two codes, float32 may choose the other, and the errors that follow differ then.
    same = (found - expected).abs() < 1e-4
    assert same.float().mean() > 0.95
    losses = [moments.loss((q - w).float()) for q in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


def test_gptq_lives_with_inputs_that_are_always_zero_and_with_too_few():
    x = inputs(20, 96)  # fewer tokens than columns: the moments cannot be inverted as they are
    x[:, 5:9] = 0
    w, moments = weight(8, 96), Moments.of([x])
    found = gptq(w, moments, W4).dequantize(torch.float32)
    assert found.isfinite().all()
    assert moments.loss(found - w) < moments.loss(Grid.plain(W4, w).round(w) - w)


def test_gptq_gives_up_with_a_remedy():
    moments = Moments.of([inputs(64, 32)])
    broken = replace(moments, second=-moments.second)
    with pytest.raises(UnsupportedModelError, match="method 'awq'"):
        gptq(weight(4, 32), broken, W4)


def test_awq_takes_the_factors_that_do_least_harm():
    case = problem()
    wanted = awq_scales(case.weight, case.inputs, case.spec.group_size)[3]

    def harm(solution):
        return 1.0 if solution.scale is None else float((solution.scale - wanted).square().sum())

    found = METHODS["awq"](replace(case, harm=harm))
    assert torch.equal(found.scale, wanted)
    assert METHODS["awq"](replace(case, harm=lambda it: float(it.scale is not None))).scale is None


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_awq_knows_factors_that_lose_less(seed):
    """Large inputs come to lie on finer steps."""
    w, moments = weight(16, 64, seed), Moments.of([inputs(256, 64, seed)])

    def loss(scale):
        return moments.loss(Grid.plain(W4, w * scale).round(w * scale) / scale - w)

    scales = awq_scales(w, moments, W4.group_size)
    assert all((scale > 0).all() for scale in scales)
    assert min(map(loss, scales)) < loss(torch.ones(64))


def test_tied_factors_are_equal():
    ties = torch.arange(8) % 4
    scale = tied(torch.arange(1.0, 9.0), ties)
    assert torch.equal(scale[:4], scale[4:])
    assert float(scale[0]) == pytest.approx((1 * 5) ** 0.5)


def test_smoothquant_takes_outliers_off_the_inputs():
    x = inputs(512, 128)
    case = replace(problem(spec=W8A8), inputs=Moments.of([x]))

    def output_error(solution):
        ops = ReferenceOps()
        scale = 1.0 if solution.scale is None else solution.scale
        found, expected = ops.linear(x / scale, ops.prepare(solution.weight)), x @ case.weight.T
        return float((found - expected).norm() / expected.norm())

    smooth, plain = (METHODS["smoothquant"](it) for it in (case, replace(case, settled=None)))
    assert smooth.weight.inputs is not None
    assert output_error(smooth) < 0.6 * output_error(plain)
    assert output_error(smooth) < 0.02
