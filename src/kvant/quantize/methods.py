"""The methods by name: from a linear layer's weight and what its inputs are like to the weight in few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from kvant.formats.weight import InputCodes, PackedWeight
from kvant.quantize.awq import awq_scale
from kvant.quantize.descent import descend
from kvant.quantize.gptq import gptq
from kvant.quantize.grid import Grid, GridSpec
from kvant.quantize.moments import Moments
from kvant.quantize.smoothquant import smoothquant_scale


@dataclass(frozen=True)
class Problem:
    """A linear layer to be quantized.

    Attributes:
        weight: [N, K] float32.
        inputs: on the calibration text.
        unseen: on another part of it, for methods that compare others; None where there is none.
        spec: what the codes are like.
        settled: the factors [K] nearest to some that the inputs can be divided by; None where they cannot be divided.
        ties: [K] int64, inputs of one number have one factor; None where all may differ.
    """

    weight: Tensor
    inputs: Moments
    unseen: Moments | None
    spec: GridSpec
    settled: Callable[[Tensor], Tensor] | None = None
    ties: Tensor | None = None

    def scaled(self, scale: Tensor) -> Problem:
        """The same with the inputs divided by factors [K], and the weight multiplied; nothing is left to compare on."""
        return replace(self, weight=self.weight * scale, inputs=self.inputs.divided(scale), unseen=None, settled=None)


@dataclass(frozen=True)
class Solution:
    """A weight in few bits.

    Attributes:
        method: that made it.
        weight: of the columns multiplied by `scale`.
        scale: [K] float32, by which the inputs are divided; None: they are as they were.
    """

    method: str
    weight: PackedWeight
    scale: Tensor | None = None

    def error(self, problem: Problem, inputs: Moments) -> float:
        """What share of the outputs' energy the errors of the weight are, on such inputs."""
        return inputs.loss(self._errors(problem)) / max(inputs.loss(problem.weight), 1e-30)

    def mean_error(self, problem: Problem, inputs: Moments) -> float:
        """What share of an output's energy its errors are, the mean of all outputs: what solutions are compared by.

        Fused projections have outputs of very different size, values beside queries and keys, which count the same.
        """
        shares = inputs.energy(self._errors(problem)) / inputs.energy(problem.weight).clamp(min=1e-30)
        return float(shares.mean())

    def _errors(self, problem: Problem) -> Tensor:
        values = self.weight.dequantize(torch.float32)
        if self.scale is not None:
            values /= self.scale
        return values.sub_(problem.weight)


Method = Callable[[Problem], Solution]


def _plain(problem: Problem) -> Solution:
    grid = Grid.plain(problem.spec, problem.weight)
    return Solution("plain", grid.pack(grid.codes(problem.weight)))


def _rtn(problem: Problem) -> Solution:
    grid = Grid.fitted(problem.spec, problem.weight, problem.inputs.importance)
    return Solution("rtn", grid.pack(grid.codes(problem.weight)))


def _gptq(problem: Problem) -> Solution:
    return Solution("gptq", gptq(problem.weight, problem.inputs, problem.spec))


def _smoothquant(problem: Problem) -> Solution:
    """Factors by SmoothQuant; the weight that they make is rounded by GPTQ, since they spread its columns' ranges."""
    scale, scaled = None, problem
    if problem.settled is not None:
        scale = smoothquant_scale(problem.weight, problem.inputs, problem.spec, problem.ties, problem.settled)
        scaled = problem.scaled(scale)
    weight = gptq(scaled.weight, scaled.inputs, problem.spec)
    return Solution("smoothquant", replace(weight, inputs=InputCodes()), scale)


def _after_scaling(name: str, method: Method) -> Method:
    """AWQ's search for factors, then a method for the weight that they make."""

    def solve(problem: Problem) -> Solution:
        if problem.settled is None:
            return replace(method(problem), method=name)
        scale = problem.settled(awq_scale(problem.weight, problem.inputs, problem.spec, problem.ties))
        return Solution(name, method(problem.scaled(scale)).weight, scale)

    return solve


def _gptq_descent(problem: Problem) -> Solution:
    weight = gptq(problem.weight, problem.inputs, problem.spec)
    return Solution("gptq+descent", descend(problem.weight, weight, problem.inputs, problem.spec))


def _awq(problem: Problem) -> Solution:
    if problem.settled is None:
        return replace(_rtn(problem), method="awq")
    # Factors are chosen for plain ranges, and may be of no use once ranges are fitted.
    contenders = (_after_scaling("awq", _rtn)(problem), replace(_rtn(problem), method="awq"))
    return min(contenders, key=lambda it: it.mean_error(problem, problem.inputs))


_CONTENDERS: tuple[Method, ...] = (_gptq_descent, _awq, _after_scaling("awq+gptq+descent", _gptq_descent))


def _auto(problem: Problem) -> Solution:
    """The one whose errors are smallest on text that it has not seen; then it sees that too."""
    contenders = _CONTENDERS if problem.settled else _CONTENDERS[:2]
    if problem.unseen is None:
        return min((method(problem) for method in contenders), key=lambda it: it.mean_error(problem, problem.inputs))
    errors = {method: method(problem).mean_error(problem, problem.unseen) for method in contenders}
    best = min(errors, key=lambda method: errors[method])
    return best(replace(problem, inputs=problem.inputs.joined(problem.unseen), unseen=None))


METHODS: Mapping[str, Method] = MappingProxyType(
    {"plain": _plain, "rtn": _rtn, "awq": _awq, "gptq": _gptq, "smoothquant": _smoothquant, "auto": _auto}
)
