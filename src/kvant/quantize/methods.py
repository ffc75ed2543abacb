"""The methods by name: from a linear layer's weight and what its inputs are like to the weight in few bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from kvant.formats.weight import InputCodes, PackedWeight
from kvant.quantize.awq import awq_scales
from kvant.quantize.gptq import Sweep, gptq
from kvant.quantize.grid import Grid, GridSpec
from kvant.quantize.moments import Moments
from kvant.quantize.smoothquant import smoothquant_scale


@dataclass(frozen=True)
class Problem:
    """A linear layer to be quantized.

    Attributes:
        weight: [N, K] float32.
        inputs: on the calibration text.
        spec: what the codes are like.
        harm: what a solution does to the model, see `Trial.harm`.
        settled: the factors [K] nearest to some that the inputs can be divided by; None where they cannot be divided.
        ties: [K] int64, inputs of one number have one factor; None where all may differ.
        others: makes the inputs on all of the calibration text but that which `harm` is measured on; None where there
            is no other, or nobody asks.
    """

    weight: Tensor
    inputs: Moments
    spec: GridSpec
    harm: Callable[[Solution], float]
    settled: Callable[[Tensor], Tensor] | None = None
    ties: Tensor | None = None
    others: Callable[[], Moments] | None = None

    @property
    def held_out(self) -> Problem:
        """The same for who may not see the text that `harm` is measured on."""
        return self if self.others is None else replace(self, inputs=self.others(), others=None)

    def scaled(self, scale: Tensor) -> Problem:
        """The same with the inputs divided by factors [K], and the weight multiplied."""
        return replace(
            self,
            weight=self.weight * scale,
            inputs=self.inputs.divided(scale),
            harm=lambda solution: self.harm(replace(solution, scale=scale)),
            settled=None,
            others=None,
        )

    def least_harmful(self, contenders: Iterable[Solution]) -> Solution:
        """The one of some solutions."""
        return min(contenders, key=self.harm)


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
        values = self.weight.dequantize(torch.float32)
        if self.scale is not None:
            values /= self.scale
        return inputs.loss(values.sub_(problem.weight)) / max(inputs.loss(problem.weight), 1e-30)


Method = Callable[[Problem], Solution]


def _plain(problem: Problem) -> Solution:
    grid = Grid.plain(problem.spec, problem.weight)
    return Solution("plain", grid.pack(grid.codes(problem.weight)))


def _rtn(problem: Problem) -> Solution:
    """With ranges that are clipped where that lessens the errors, or with full ones, whichever does less harm."""

    def rounded(spec: GridSpec) -> Solution:
        grid = Grid.fitted(spec, problem.weight, problem.inputs.importance)
        return Solution("rtn", grid.pack(grid.codes(problem.weight)))

    return problem.least_harmful(map(rounded, problem.spec.either_range))


def _gptq(problem: Problem) -> Solution:
    """With clipped ranges or full ones, as above."""
    sweep = Sweep.of(problem.inputs, problem.spec.group_size)
    specs = problem.spec.either_range
    return problem.least_harmful(Solution("gptq", sweep.round(problem.weight, spec)) for spec in specs)


def _smoothquant(problem: Problem) -> Solution:
    """Factors by SmoothQuant; the weight that they make is rounded by GPTQ, since they spread its columns' ranges."""
    scale, scaled = None, problem
    if problem.settled is not None:
        scale = smoothquant_scale(problem.weight, problem.inputs, problem.spec, problem.ties, problem.settled)
        scaled = problem.scaled(scale)
    weight = gptq(scaled.weight, scaled.inputs, problem.spec)
    return Solution("smoothquant", replace(weight, inputs=InputCodes()), scale)


def _plain_scaled(problem: Problem, scale: Tensor) -> Solution:
    weight = problem.weight * scale
    grid = Grid.plain(problem.spec, weight)
    return Solution("awq", grid.pack(grid.codes(weight)), scale)


def _awq(problem: Problem) -> Solution:
    """AWQ's factors as they suit plain ranges, then ranges; or none, where they are of no use."""
    contenders = [_rtn(problem)]
    if problem.settled is not None:
        scales = awq_scales(problem.weight, problem.inputs, problem.spec.group_size, problem.ties)
        scaled = problem.least_harmful(_plain_scaled(problem, problem.settled(scale)) for scale in scales)
        assert scaled.scale is not None
        contenders += (scaled, replace(_rtn(problem.scaled(scaled.scale)), scale=scaled.scale))
    return replace(problem.least_harmful(contenders), method="awq")


def _auto(problem: Problem) -> Solution:
    """GPTQ or AWQ: the one that does less harm to a text that it has not seen. Then it sees that, too."""
    return _less_harmful_method(problem.held_out)(problem)


def _less_harmful_method(problem: Problem) -> Method:
    return min((_gptq, _awq), key=lambda method: problem.harm(method(problem)))


METHODS: Mapping[str, Method] = MappingProxyType(
    {"plain": _plain, "rtn": _rtn, "awq": _awq, "gptq": _gptq, "smoothquant": _smoothquant, "auto": _auto}
)
