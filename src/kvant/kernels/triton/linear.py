"""Linear layers on weights of any kind."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from kvant.kernels.triton import linear_int8, linear_packed
from kvant.kernels.triton.input_codes import rounded_inputs
from kvant.kernels.triton.norm import Rounded
from kvant.kernels.triton.tuning import Tuning
from kvant.kernels.triton.weights import Dense, RowCodes, TritonWeight

UNTUNED = Tuning()


def linear(x: Tensor | Rounded, weight: TritonWeight, bias: Tensor | None = None, tuning: Tuning = UNTUNED) -> Tensor:
    """`Ops.linear`: x [T, K] -> [T, N] in its dtype; rows that are codes already are for weights that take codes."""
    if isinstance(weight, RowCodes):
        config = tuning.pick(linear_int8, len(x), weight)
        return linear_int8.linear_int8(x, weight, bias, config)
    assert isinstance(x, Tensor), "only weights that take codes are given codes"
    if weight.inputs is not None:
        x = rounded_inputs(x, weight.inputs)
    if isinstance(weight, Dense):
        return F.linear(x, weight.matrix.to(x.dtype), bias)
    return linear_packed.linear_packed(x, weight, bias, tuning.pick(linear_packed, len(x), weight, x.dtype))


def takes_codes(weight: Any) -> bool:
    """Whether the weight's products are of inputs that are codes, in the order in which they come."""
    return isinstance(weight, RowCodes) and weight.order is None
