"""Linear layers on weights of any kind."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kvant.kernels.triton.input_codes import rounded_inputs
from kvant.kernels.triton.linear_int8 import linear_int8, product
from kvant.kernels.triton.linear_packed import linear_packed
from kvant.kernels.triton.norm import Rounded
from kvant.kernels.triton.weights import Dense, RowCodes, TritonWeight


def linear(x: Tensor | Rounded, weight: TritonWeight, bias: Tensor | None = None) -> Tensor:
    """`Ops.linear`: x [T, K] -> [T, N] in its dtype; `Rounded` inputs are for `RowCodes` whose columns are in order."""
    if isinstance(x, Rounded):
        assert isinstance(weight, RowCodes), "rounded rows were made for another weight"
        return product(x, weight, bias)
    if isinstance(weight, RowCodes):
        return linear_int8(x, weight, bias)
    if weight.inputs is not None:
        x = rounded_inputs(x, weight.inputs)
    if isinstance(weight, Dense):
        return F.linear(x, weight.matrix.to(x.dtype), bias)
    return linear_packed(x, weight, bias)
