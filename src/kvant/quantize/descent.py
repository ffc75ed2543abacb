"""Coordinate descent: the codes of a rounded weight changed one column after the other, as long as outputs gain by it.

GPTQ fixes each column once, knowing only those before it; here every column is looked at again with all others in
place. Nair, Suggala: "CDQuant: Greedy Coordinate Descent for Accurate LLM Quantization", 2024, in a fixed order of the
columns. Between two passes the scales become those that are best for the codes, by least squares over a row's groups.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvant.formats.weight import PackedWeight
from kvant.quantize.grid import Grid, GridSpec
from kvant.quantize.moments import Moments

_DAMPING = 0.01
_PASSES = 2
_PRIOR = 1e-3  # how much scales are held to what they were, relative to the diagonal of A
_BLOCK = 128  # columns whose changes are carried on together
_ELEMENTS_AT_ONCE = 1 << 24  # of A


def descend(weight: Tensor, found: PackedWeight, inputs: Moments, spec: GridSpec) -> PackedWeight:
    """A rounded weight with smaller errors of its outputs on the calibration text.

    Args:
        weight: [N, K] float32, what it is to be.
        found: what it is, of this spec.
        inputs: of the layer.
        spec: what the codes are like.
    """
    second = inputs.second.clone()
    second.diagonal().add_(_DAMPING * float(second.diagonal().mean()) + 1e-12)
    grid, codes = _grid_of(found, spec), found.codes.float()
    for _ in range(_PASSES):
        codes = _pass(weight, codes, grid, second)
        grid = _refitted(weight, codes, grid, second)
    return grid.pack(_pass(weight, codes, grid, second))


def _grid_of(weight: PackedWeight, spec: GridSpec) -> Grid:
    scale = weight.planes["scale"].data.float()
    middle = torch.full_like(scale, (spec.top + 1) / 2)
    return Grid(spec, scale, weight.planes["zero"].data.float() if "zero" in weight.planes else middle)


def _pass(weight: Tensor, codes: Tensor, grid: Grid, second: Tensor) -> Tensor:
    """Every column once: [N, K], the new codes."""
    codes, group = codes.clone(), grid.spec.group_size
    # What the outputs would gain, to first order, if a weight grew: (w - q) H.
    pull = (weight - grid.values(codes)) @ second
    for first in range(0, weight.shape[1], _BLOCK):
        last = min(first + _BLOCK, weight.shape[1])
        local, near = second[first:last, first:last], pull[:, first:last].clone()
        changes = torch.zeros_like(near)
        for j in range(last - first):
            at = (first + j) // group
            scale, code = grid.scale[:, at], codes[:, first + j]
            step = torch.where(scale == 0, 0.0, near[:, j] / (local[j, j] * scale)).round_()
            better = (code + step).clamp_(0, grid.spec.top)
            change = (better - code).mul_(scale)
            codes[:, first + j] = better
            changes[:, j] = change
            near[:, j:].addr_(change, local[j, j:], alpha=-1)
        pull.addmm_(changes, second[first:last], alpha=-1)
    return codes


def _refitted(weight: Tensor, codes: Tensor, grid: Grid, second: Tensor) -> Grid:
    """With the scales that suit the codes best, some rows at a time."""
    step = max(1, _ELEMENTS_AT_ONCE // grid.scale.shape[1] ** 2)
    rows = [slice(first, first + step) for first in range(0, len(weight), step)]
    parts = [
        _refit(weight[some], codes[some], replace(grid, scale=grid.scale[some], zero=grid.zero[some]), second)
        for some in rows
    ]
    return replace(grid, scale=torch.cat(parts))


def _refit(weight: Tensor, codes: Tensor, grid: Grid, second: Tensor) -> Tensor:
    """The scales [N, groups] that suit the codes best; rows that are not better once these are rounded keep theirs.

    With c the codes less their zero points, a row's error is a quadratic form of its scales, s A s - 2 b s, where A is
    c_g H c_h for each two groups, and b is c_g H w.
    """
    steps = (codes.unflatten(1, (-1, grid.spec.group_size)) - grid.zero.unsqueeze(-1)).flatten(1)
    size, groups = grid.spec.group_size, grid.scale.shape[1]

    def by_group(products: Tensor) -> Tensor:
        sums: Tensor = (products * steps).unflatten(1, (groups, size)).sum(-1)
        return sums

    b = by_group(weight @ second)
    columns = (slice(first, first + size) for first in range(0, weight.shape[1], size))
    a = torch.stack([by_group(steps[:, some] @ second[some]) for some in columns], dim=2)
    prior = _PRIOR * a.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    scale = torch.linalg.solve(a + torch.diag_embed(prior), b + prior * grid.scale)
    scale = grid.spec.stored(scale)

    def loss(s: Tensor) -> Tensor:
        return ((a @ s.unsqueeze(-1)).squeeze(-1) * s - 2 * b * s).sum(1)

    better = (loss(scale) < loss(grid.scale)) & scale.isfinite().all(1)
    return torch.where(better.unsqueeze(1), scale, grid.scale)
