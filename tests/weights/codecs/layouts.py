"""The published layouts read element by element, as their descriptions say: slow, and by no code of kvant's.

Stored modules are dicts from the last part of a tensor's name to the tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Parts = dict[str, Tensor]

_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of 8 that each nibble of a word holds


def bits_of(word: Tensor, start: int, count: int) -> int:
    """Some bits of a 32-bit word, from its lowest."""
    return (int(word) & 0xFFFFFFFF) >> start & ((1 << count) - 1)


def gptq_values(parts: Parts, bits: int, version: int, group_size: int | None = None) -> Tensor:
    """[N, K] float32."""
    qweight, scales, per_word = parts["qweight"], parts["scales"].float(), 32 // bits
    rows, columns = qweight.shape[1], qweight.shape[0] * per_word
    size = group_size or columns

    def value(n: int, k: int) -> float:
        group = int(parts["g_idx"][k]) if "g_idx" in parts else k // size
        code = bits_of(qweight[k // per_word, n], bits * (k % per_word), bits)
        word = int(parts["qzeros"][group, n // per_word]) & 0xFFFFFFFF
        if version == 1:
            word += sum(1 << (bits * i) for i in range(per_word))
        zero = bits_of(torch.tensor(word & 0xFFFFFFFF), bits * (n % per_word), bits)
        return (code - zero) * float(scales[group, n])

    return _matrix(rows, columns, value)


def awq_gemm_values(parts: Parts, group_size: int) -> Tensor:
    """[N, K] float32."""
    columns, rows = parts["qweight"].shape[0], parts["qweight"].shape[1] * 8

    def nibble(words: Tensor, n: int) -> int:
        return bits_of(words[n // 8], 4 * _AWQ_OUTPUTS.index(n % 8), 4)

    def value(n: int, k: int) -> float:
        zero = nibble(parts["qzeros"][k // group_size], n)
        return (nibble(parts["qweight"][k], n) - zero) * float(parts["scales"][k // group_size, n])

    return _matrix(rows, columns, value)


def awq_gemv_values(parts: Parts, group_size: int) -> Tensor:
    """[N, K] float32."""
    rows, columns = parts["qweight"].shape[0], parts["qweight"].shape[1] * 8

    def value(n: int, k: int) -> float:
        code, group = bits_of(parts["qweight"][n, k // 8], 4 * (k % 8), 4), k // group_size
        zero = bits_of(parts["qzeros"][n, group // 8], 4 * (group % 8), 4)
        return (code - zero) * float(parts["scales"][n, group])

    return _matrix(rows, columns, value)


def _matrix(rows: int, columns: int, value: Callable[[int, int], float]) -> Tensor:
    return torch.tensor([[value(n, k) for k in range(columns)] for n in range(rows)])
