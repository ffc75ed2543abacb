"""SmoothQuant: weights and inputs in 8 bits, after moving the inputs' outliers into the weights.

Xiao, Lin, Seznec, Wu, Demouth, Han: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", 2023. How much is moved, its alpha, is measured for each layer instead of being set for a model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvant.formats.weight import InputCodes
from kvant.kernels.reference import rounded_inputs
from kvant.quantize.awq import tied
from kvant.quantize.grid import Grid, GridSpec, spread
from kvant.quantize.moments import Moments

_ALPHAS = tuple(i / 20 for i in range(6, 20))
_ROWS = 1024  # of the weight, and
_TOKENS = 256  # inputs, that alphas are compared on


def smoothed(weight: Tensor, inputs: Moments, ties: Tensor | None, spec: GridSpec) -> list[Tensor]:
    """The factors [K] float32 that each alpha asks for; 1 is the first."""
    columns = weight.abs().amax(0).clamp(min=1e-5)
    largest = inputs.largest.clamp(min=1e-5)
    found = [torch.ones_like(columns)]
    for alpha in _ALPHAS:
        scale = tied(largest.pow(alpha) / columns.pow(1 - alpha), ties)
        found.append(scale / (scale.amax() * scale.amin()).sqrt())
    return found


def smoothquant_scale(
    weight: Tensor, inputs: Moments, spec: GridSpec, ties: Tensor | None, settled: Callable[[Tensor], Tensor]
) -> Tensor:
    """The factors [K] with which the rounded weight on rounded inputs gives outputs nearest to the plain ones.

    Args:
        weight: [N, K] float32.
        inputs: of the layer.
        spec: what the codes are like.
        ties: see `awq.tied`.
        settled: the factors nearest to some that can be stored.
    """
    rows = spread(weight, _ROWS)
    sample = spread(inputs.sample, _TOKENS)
    wanted = sample @ rows.T

    def loss(scale: Tensor) -> float:
        grid = Grid.plain(spec, rows * scale)
        found = rounded_inputs(sample / scale, InputCodes()) @ grid.round(rows * scale).T
        return float((found - wanted).square().sum(dtype=torch.float64))

    return min((settled(scale) for scale in smoothed(weight, inputs, ties, spec)), key=loss)
