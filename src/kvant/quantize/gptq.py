"""GPTQ: columns are rounded one after the other, and those that follow make up for each one's errors.

Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2023. Groups are visited by how much their inputs matter, and the columns within a group too, so that
errors fall where they count least; each group's columns stay together, so a checkpoint needs no order of its columns. A
group's grid is fitted when its turn comes, to what its weights have become by then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvant.errors import UnsupportedModelError
from kvant.formats.weight import PackedWeight
from kvant.quantize.grid import Grid, GridSpec
from kvant.quantize.moments import Moments

DAMPING = 0.01
_RETRIES = 6
_BLOCK = 128  # columns whose errors are carried on together


@dataclass(frozen=True)
class Sweep:
    """How the columns of weights that share their inputs are visited, and what their errors ask of those that follow.

    Attributes:
        order: [K] int64, see the module.
        factor: U [K, K], upper triangular, with U^T U the inverse of the inputs' second moments, in that order.
        importance: [K], how much a column's errors count once the columns after it have made up for them.
    """

    order: Tensor
    factor: Tensor
    importance: Tensor

    @classmethod
    def of(cls, inputs: Moments, group_size: int, damping: float = DAMPING) -> Sweep:
        """For codes in groups of some size.

        Args:
            inputs: of the layer.
            group_size: columns of a row that share a scale.
            damping: what is added to the second moments' diagonal, relative to its mean; where they cannot be inverted
                so, ten times as much is tried, some times.

        Raises:
            UnsupportedModelError: they cannot be inverted at all.
        """
        order = _visiting_order(inputs.importance, group_size)
        factor = _inverse_factor(inputs.second, order, damping)
        # An input that is always zero has a moment only to be divided by; no error of its weights counts.
        importance = torch.where(inputs.importance[order] == 0, 0.0, factor.diagonal().square().reciprocal())
        return cls(order, factor, importance)

    def round(self, weight: Tensor, spec: GridSpec) -> PackedWeight:
        """A weight [N, K] float32 rounded so that the outputs on the calibration text change least.

        All rows see the same inputs, so projections that share theirs may be stacked.
        """
        work, group = weight[:, self.order], spec.group_size
        codes = torch.empty_like(work)
        scales = torch.empty(len(work), len(self.order) // group)
        zeros = torch.empty_like(scales)
        for first in range(0, len(self.order), group):
            columns = slice(first, first + group)
            grid = Grid.fitted(spec, work[:, columns], self.importance[columns])
            at = self.order[first] // group
            scales[:, at : at + 1], zeros[:, at : at + 1] = grid.scale, grid.zero
            _round_group(work, codes, grid, self.factor, first)
        return Grid(spec, scales, zeros).pack(codes[:, self.order.argsort()])


def gptq(weight: Tensor, inputs: Moments, spec: GridSpec) -> PackedWeight:
    """One weight [N, K] float32 rounded for its inputs, see `Sweep`."""
    return Sweep.of(inputs, spec.group_size).round(weight, spec)


def _visiting_order(importance: Tensor, group: int) -> Tensor:
    """[K] int64: groups of large inputs first, and in each its columns of large inputs."""
    by_group = importance.unflatten(0, (-1, group))
    within = by_group.argsort(dim=1, descending=True)
    groups = by_group.sum(1).argsort(descending=True)
    order: Tensor = (within + torch.arange(len(by_group)).unsqueeze(1) * group)[groups].flatten()
    return order


def _inverse_factor(second: Tensor, order: Tensor, damping: float) -> Tensor:
    """U [K, K], upper triangular, with U^T U the inverse of the damped second moments in this order.

    An input that is always zero gets a moment of its own: whatever its weight is, no output shows it.
    """
    mean, backwards = second.diagonal().mean(), order.flip(0)
    dead = second.diagonal()[backwards] == 0
    for retry in range(_RETRIES):
        # Of the matrix turned around, L L^T; turned back, L is the upper triangular R of R R^T, whose inverse is U.
        damped = second[backwards][:, backwards]
        damped.diagonal().add_(damping * 10**retry * mean)
        damped.diagonal()[dead] = mean if mean > 0 else 1.0
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # each of these is as large as the moments
        if not failed:
            upper = lower.flip(0, 1)
            del lower
            factor = torch.linalg.solve_triangular(upper, torch.eye(len(second)), upper=True)
            del upper
            if factor.isfinite().all():
                return Tensor(factor)
    raise UnsupportedModelError(
        "GPTQ cannot invert the second moments of a layer's inputs on this calibration text; give a longer or more "
        "varied text, or use method 'awq'"
    )


def _round_group(work: Tensor, codes: Tensor, grid: Grid, factor: Tensor, first: int) -> None:
    """Round one group's columns in place of `work`, and change those that follow as its errors ask for."""
    stop = first + grid.spec.group_size
    scale, zero = grid.scale, grid.zero
    steps = torch.where(scale == 0, 0.0, 1 / scale)
    for begin in range(first, stop, _BLOCK):
        end = min(begin + _BLOCK, stop)
        block, errors = work[:, begin:end], torch.empty(len(work), end - begin)
        local = factor[begin:end, begin:end]
        for j in range(end - begin):
            column = block[:, j : j + 1]
            code = (column * steps + zero).round_().clamp_(0, grid.spec.top)
            codes[:, begin + j : begin + j + 1] = code
            error = (column - (code - zero) * scale) / local[j, j]
            block[:, j:].addmm_(error, local[j : j + 1, j:], alpha=-1)
            errors[:, j : j + 1] = error
        work[:, end:].addmm_(errors, factor[begin:end, end:], alpha=-1)
