"""AWQ: input channels that matter are scaled up before rounding, and their inputs scaled down.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: "AWQ: Activation-aware Weight Quantization for On-Device LLM
Compression and Acceleration", 2024. A candidate's error is read off the inputs' second moments, so that no layer has to
run again for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvant.quantize.grid import Grid, GridSpec, spread
from kvant.quantize.moments import Moments

_STEPS = 20
_ROWS, _FEWEST_ROWS = 1024, 128  # of the weight, that candidates are compared on
_PRODUCTS = 1 << 32


def awq_scale(weight: Tensor, inputs: Moments, spec: GridSpec, ties: Tensor | None = None) -> Tensor:
    """The factor [K] float32 of each input channel with which the rounded weight is best.

    Args:
        weight: [N, K] float32.
        inputs: of the layer.
        spec: what the codes are like.
        ties: [K] int64, channels of one number have one factor (see `tied`).
    """
    # Products with the moments are what takes the time: few rows of a wide weight tell enough.
    rows = spread(weight, min(_ROWS, max(_FEWEST_ROWS, _PRODUCTS // weight.shape[1] ** 2)))
    # Of each output by itself: values are smaller than the queries and keys beside them, and count as much.
    shares = inputs.energy(rows).clamp(min=1e-30).rsqrt().unsqueeze(1)
    best, least = torch.ones(weight.shape[1]), torch.inf
    for candidate in _candidates(weight, inputs, spec, ties):
        scaled = rows * candidate
        grid = Grid.plain(spec, scaled)
        loss = inputs.loss(grid.round(scaled).sub_(scaled).div_(candidate).mul_(shares))
        if loss < least:
            best, least = candidate, loss
    return best


def _candidates(weight: Tensor, inputs: Moments, spec: GridSpec, ties: Tensor | None) -> list[Tensor]:
    """1, and x^r / w^(1 - r) for some r: x the inputs' mean magnitude, w the weights' within their groups."""
    groups = weight.abs().unflatten(1, (-1, spec.group_size))
    share = (groups / groups.amax(-1, keepdim=True).clamp(min=1e-30)).flatten(1).mean(0)
    x = inputs.magnitude.clamp(min=1e-6 * float(inputs.magnitude.max().clamp(min=1e-30)))
    found = [torch.ones_like(x)]
    for step in range(1, _STEPS + 1):
        ratio = step / _STEPS
        scale = tied(x.pow(ratio) / (share.pow(1 - ratio) + 1e-4), ties)
        scale = scale / (scale.amax() * scale.amin()).sqrt()
        found.append(scale.clamp(min=1e-4, max=1e4))
    return found


def tied(scale: Tensor, ties: Tensor | None) -> Tensor:
    """Factors [K] in which channels of one number in `ties` have one value: the geometric mean of theirs."""
    if ties is None:
        return scale
    count = torch.zeros(int(ties.max()) + 1).index_add_(0, ties, torch.ones_like(scale))
    logs = torch.zeros_like(count).index_add_(0, ties, scale.log())
    return (logs / count.clamp(min=1)).exp()[ties]
