"""The values that codes of a few bits can take: a scale and maybe a zero point for each group of a row.

The sums over a group are weighed by what its columns' inputs are like, since an error matters as much as the input that
it is multiplied with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvant.errors import UnsupportedModelError
from kvant.formats.weight import PackedWeight, pair

_ELEMENTS_AT_ONCE = 1 << 16  # rounded together: with what is made of them, they stay in a core's cache
_SHRINKS = tuple(1 - i / 25 for i in range(14))  # of a group's range: 1 to 0.48


@dataclass(frozen=True)
class GridSpec:
    """How a weight is cut into codes.

    Attributes:
        bits: 4 or 8.
        group_size: columns of a row that share a scale; it divides the row.
        symmetric: the code of zero is 2^(bits - 1); the largest magnitude of a group may take either end.
        scale_dtype: what a scale is rounded to before it is used. float16 in any case.
        clipped: whether a fitted range may be narrower than its group's values.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype = torch.float16
    clipped: bool = True

    @property
    def top(self) -> int:
        """The largest code; the smallest is 0."""
        return (1 << self.bits) - 1

    @property
    def either_range(self) -> tuple[GridSpec, GridSpec]:
        """The same with ranges that are clipped where that lessens the errors, and with full ones."""
        return replace(self, clipped=True), replace(self, clipped=False)

    def stored(self, scale: Tensor) -> Tensor:
        """Scales as they will be read again, float32."""
        return scale.half().to(self.scale_dtype).float()


@dataclass(frozen=True)
class Grid:
    """The values of groups: (code - zero) * scale. scale and zero are float32 [N, groups], a zero is a code."""

    spec: GridSpec
    scale: Tensor
    zero: Tensor

    @classmethod
    def plain(cls, spec: GridSpec, weight: Tensor) -> Grid:
        """From the smallest to the largest value of each group of `weight` [N, K] float32, nothing searched."""
        groups = weight.unflatten(1, (-1, spec.group_size))
        return _spanning(spec, groups.amin(-1), groups.amax(-1), 1.0)

    @classmethod
    def fitted(cls, spec: GridSpec, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """The one, of some that clip more or less, whose rounding errors are smallest.

        Args:
            spec: what it is like.
            weight: [N, K] float32.
            importance: [K], what a column's squared errors are multiplied with; None is 1.
        """
        step = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
        parts = [_fit(spec, rows, importance) for rows in weight.split(step)]
        return cls(spec, torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts]))

    def codes(self, weight: Tensor) -> Tensor:
        """The codes [N, K] float32 of the nearest values."""
        groups = weight.unflatten(1, (-1, self.spec.group_size))
        steps = groups * _inverse(self.scale.unsqueeze(-1))
        codes: Tensor = steps.add_(self.zero.unsqueeze(-1)).round_().clamp_(0, self.spec.top).flatten(1)
        return codes

    def values(self, codes: Tensor) -> Tensor:
        """The values [N, K] of codes."""
        groups = codes.unflatten(1, (-1, self.spec.group_size))
        values: Tensor = ((groups - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)).flatten(1)
        return values

    def round(self, weight: Tensor) -> Tensor:
        """The nearest values [N, K]."""
        return self.values(self.codes(weight))

    def pack(self, codes: Tensor) -> PackedWeight:
        """The weight that has these codes [N, K].

        Raises:
            UnsupportedModelError: a scale is not finite in float16.
        """
        scale = self.scale.to(self.spec.scale_dtype)
        if not self.scale.isfinite().all():
            raise UnsupportedModelError(
                "a weight cannot be quantized: some of its values are not finite, or too large for a scale in float16"
            )
        q = codes.to(torch.uint8)
        zero = None if self.spec.symmetric else self.zero.to(torch.uint8)
        packed = pair(q) if self.spec.bits == 4 else q
        return PackedWeight.quantized(self.spec.bits, packed, scale, zero=zero, group_size=self.spec.group_size)


def _spanning(spec: GridSpec, low: Tensor, high: Tensor, shrink: float) -> Grid:
    """The grid whose ends are a share of a range [low, high]; zero is always one of its values."""
    if spec.symmetric:
        largest = torch.where(high > -low, high, low)
        scale = spec.stored(largest.abs() * shrink / (spec.top / 2))
        return Grid(spec, scale, torch.full_like(scale, (spec.top + 1) / 2))
    low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
    scale = spec.stored((high - low) / spec.top)
    zero = torch.where(scale == 0, 0.0, -low / scale).round_().clamp_(0, spec.top)
    return Grid(spec, scale, zero)


def _one_sided(spec: GridSpec, low: Tensor, high: Tensor, shrink: float) -> Grid:
    """A symmetric grid on which the largest magnitude takes the end that reaches further; scales may be negative."""
    largest = torch.where(high > -low, high, low)
    scale = spec.stored(-largest * shrink / ((spec.top + 1) / 2))
    return Grid(spec, scale, torch.full_like(scale, (spec.top + 1) / 2))


def _fit(spec: GridSpec, weight: Tensor, importance: Tensor | None) -> Grid:
    groups = weight.unflatten(1, (-1, spec.group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    counts = None if importance is None else importance.unflatten(0, (-1, spec.group_size))
    best, least = _spanning(spec, low, high, 1.0), torch.full_like(low, torch.inf)
    makers = (_spanning, _one_sided) if spec.symmetric else (_spanning,)
    shrinks = _SHRINKS if spec.clipped else (1.0,)
    for grid in (make(spec, low, high, shrink) for shrink in shrinks for make in makers):
        loss = _loss(grid, groups, counts)
        better = loss < least
        best = Grid(spec, torch.where(better, grid.scale, best.scale), torch.where(better, grid.zero, best.zero))
        least = torch.where(better, loss, least)
    return best


def _loss(grid: Grid, groups: Tensor, counts: Tensor | None) -> Tensor:
    """The squared error of each group, [N, groups], its columns weighed with `counts` [groups, group]."""
    scale, zero = grid.scale.unsqueeze(-1), grid.zero.unsqueeze(-1)
    codes = (groups * _inverse(scale)).add_(zero).round_().clamp_(0, grid.spec.top)
    error = codes.sub_(zero).mul_(scale).sub_(groups).square_()
    total: Tensor = (error if counts is None else error.mul_(counts)).sum(-1)
    return total


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for 0."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def spread(rows: Tensor, count: int) -> Tensor:
    """So many of the rows, at equal distances; all where there are fewer."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]
