"""AWQ: input channels that matter are scaled up before rounding, and their inputs scaled down.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: "AWQ: Activation-aware Weight Quantization for On-Device LLM
Compression and Acceleration", 2024.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvant.quantize.moments import Moments

_STEPS = 10


def awq_scales(weight: Tensor, inputs: Moments, group_size: int, ties: Tensor | None = None) -> list[Tensor]:
    """The factors [K] float32 of the input channels to choose from: x^r / w^(1 - r) for some r.

    x is the inputs' mean magnitude, w the weights' within their groups.

    Args:
        weight: [N, K] float32.
        inputs: of the layer.
        group_size: of its codes.
        ties: [K] int64, channels of one number have one factor (see `tied`).
    """
    groups = weight.abs().unflatten(1, (-1, group_size))
    share = (groups / groups.amax(-1, keepdim=True).clamp(min=1e-30)).flatten(1).mean(0)
    x = inputs.magnitude.clamp(min=1e-6 * float(inputs.magnitude.max().clamp(min=1e-30)))
    found = []
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
