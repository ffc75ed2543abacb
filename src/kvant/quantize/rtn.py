"""Round to nearest: a weight in 4 or 8 bits from its values alone, without any text."""

from __future__ import annotations

import torch
from torch import Tensor

from kvant.config import WEIGHT_GROUP_SIZES
from kvant.errors import ConfigError, UnsupportedModelError
from kvant.formats.weight import PackedWeight, pair

_ELEMENTS_AT_ONCE = 1 << 17  # rounded together: with what is made of them, they stay in a core's cache
# What a group's largest magnitude may become in 4 bits: the codes' ends, -8 and 7, and beyond, where it is clipped and
# the others are rounded more finely.
_REACHES = tuple(end / (1 - 0.2 * i / 7) for i in range(8) for end in (-8, 7))


def rtn(weight: Tensor, bits: int, group_size: int) -> PackedWeight:
    """A weight rounded to nearest, with a float16 scale for each group and no bias.

    In 4 bits, a group's scale is the one of 16 that has the smallest squared error; in 8 bits, its largest magnitude
    becomes 127.

    Args:
        weight: [N, K], any float dtype. No copy of the whole is made.
        bits: 4 or 8.
        group_size: elements of a row that share a scale.

    Raises:
        ConfigError: K is no multiple of the group.
        UnsupportedModelError: a value is not finite, or too large for a scale in float16.
    """
    rows, columns = weight.shape
    _check_group(columns, group_size)
    q = torch.empty(rows, columns * bits // 8, dtype=torch.uint8)
    scales = torch.empty(rows, columns // group_size, dtype=torch.float16)
    step = max(1, _ELEMENTS_AT_ONCE // columns)
    for first in range(0, rows, step):
        chunk = slice(first, first + step)
        # A group is a column here, so that its sum adds up rows.
        x = weight[chunk].float().reshape(-1, group_size).T.contiguous()
        scale = _best_scale(x) if bits == 4 else (x.abs().amax(0) / 127).half()
        codes = (_rounded(x, scale.float(), bits) + 2 ** (bits - 1)).to(torch.uint8).T.reshape(-1, columns)
        q[chunk] = pair(codes) if bits == 4 else codes
        scales[chunk] = scale.view(-1, columns // group_size)
    if not scales.isfinite().all():
        raise UnsupportedModelError(
            "a weight cannot be rounded: some of its values are not finite, or too large for a scale in float16; use "
            "weights='dense'"
        )
    return PackedWeight.quantized(bits, q, scales)


def _check_group(columns: int, group_size: int) -> None:
    if columns % group_size:
        fitting = [size for size in WEIGHT_GROUP_SIZES if columns % size == 0]
        remedy = f"weights_group_size={max(fitting)}" if fitting else "weights='auto'"
        raise ConfigError(f"a weight's {columns} inputs cannot be cut into groups of {group_size}; use {remedy}")


def _best_scale(x: Tensor) -> Tensor:
    """The float16 scale [groups] of each column of x [size, groups] that 4-bit codes are best with."""
    low, high = x.amin(0), x.amax(0)
    largest = torch.where(high > -low, high, low)
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for reach in _REACHES:
        scale = (largest / reach).half().float()
        error = _rounded(x, scale, 4).mul_(scale).sub_(x).square_().sum(0)
        # Not "smaller than": an error that is no number must not leave a good scale behind.
        best = torch.where(error >= least, best, scale)
        least = torch.where(error >= least, least, error)
    return best.half()


def _rounded(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x [size, groups] in steps of each column's scale, float32; 0 where the scale is 0."""
    steps = torch.where(scale == 0, 0.0, 1 / scale)
    return (x * steps).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
