"""The published layouts read element by element, as their descriptions say: slow, and by no code of kvant's.

Stored modules are dicts from the last part of a tensor's name to the tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Parts = dict[str, Tensor]

_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of 8 that each nibble of a word holds


def bits_of(word: int, start: int, count: int) -> int:
    """Some bits of a 32-bit word, from its lowest."""
    return (word & 0xFFFFFFFF) >> start & ((1 << count) - 1)


def gptq_values(parts: Parts, bits: int, version: int, group_size: int | None = None) -> Tensor:
    """[N, K] float32."""
    per_word = 32 // bits
    rows, columns = parts["qweight"].shape[1], parts["qweight"].shape[0] * per_word
    qweight, qzeros, scales = (parts[name].tolist() for name in ("qweight", "qzeros", "scales"))
    size = group_size or columns
    groups = parts["g_idx"].tolist() if "g_idx" in parts else [k // size for k in range(columns)]
    less = sum(1 << (bits * i) for i in range(per_word)) if version == 1 else 0

    def value(n: int, k: int) -> float:
        code = bits_of(qweight[k // per_word][n], bits * (k % per_word), bits)
        zero = bits_of(qzeros[groups[k]][n // per_word] + less, bits * (n % per_word), bits)
        return (code - zero) * scales[groups[k]][n]

    return _matrix(rows, columns, value)


def awq_gemm_values(parts: Parts, group_size: int) -> Tensor:
    """[N, K] float32."""
    columns, rows = parts["qweight"].shape[0], parts["qweight"].shape[1] * 8
    qweight, qzeros, scales = (parts[name].tolist() for name in ("qweight", "qzeros", "scales"))

    def nibble(words: list[int], n: int) -> int:
        return bits_of(words[n // 8], 4 * _AWQ_OUTPUTS.index(n % 8), 4)

    def value(n: int, k: int) -> float:
        zero = nibble(qzeros[k // group_size], n)
        return (nibble(qweight[k], n) - zero) * scales[k // group_size][n]

    return _matrix(rows, columns, value)


def awq_gemv_values(parts: Parts, group_size: int) -> Tensor:
    """[N, K] float32."""
    rows, columns = parts["qweight"].shape[0], parts["qweight"].shape[1] * 8
    qweight, qzeros, scales = (parts[name].tolist() for name in ("qweight", "qzeros", "scales"))

    def value(n: int, k: int) -> float:
        code, group = bits_of(qweight[n][k // 8], 4 * (k % 8), 4), k // group_size
        return (code - bits_of(qzeros[n][group // 8], 4 * (group % 8), 4)) * scales[n][group]

    return _matrix(rows, columns, value)


def _matrix(rows: int, columns: int, value: Callable[[int, int], float]) -> Tensor:
    return torch.tensor([[value(n, k) for k in range(columns)] for n in range(rows)])
