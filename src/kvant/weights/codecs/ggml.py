"""GGML blocks to values, with the gguf package's own arithmetic, some rows at a time so that no second copy exists."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from kvant.errors import UnsupportedModelError
from kvant.formats.threads import for_each

SUPPORTED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
_ELEMENTS_AT_ONCE = 1 << 20


def decode_ggml(
    data: np.ndarray[Any, Any], kind: GGMLQuantizationType, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Values of a tensor stored in GGML blocks.

    Args:
        data: the stored rows, [rows, bytes of a row] (or [elements] of a float type).
        kind: the block type; one of `SUPPORTED`.
        shape: of the result.
        dtype: of the result.

    Raises:
        UnsupportedModelError: another block type.
    """
    if kind.name not in SUPPORTED:
        raise UnsupportedModelError(
            f"GGUF tensors of type {kind.name} are not supported; known: {', '.join(SUPPORTED)}"
        )
    out = torch.empty(shape, dtype=dtype)
    rows = out.view(-1, shape[-1])
    stored = data.reshape(rows.shape[0], -1)
    step = max(1, _ELEMENTS_AT_ONCE // shape[-1])

    def decode(first: int) -> None:
        values = dequantize(stored[first : first + step], kind)
        rows[first : first + step] = torch.from_numpy(np.array(values, dtype=np.float32))

    for_each(decode, range(0, rows.shape[0], step), rows.numel(), torch.get_num_threads())
    return out
