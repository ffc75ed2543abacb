"""Linear layers to be quantized: correlated inputs with outliers, as a model's are."""

from __future__ import annotations

import torch
from torch import Tensor

from kvant.quantize.grid import GridSpec
from kvant.quantize.methods import Problem
from kvant.quantize.moments import Moments

W4 = GridSpec(bits=4, group_size=32, symmetric=False)


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """[tokens, columns]: fewer directions than columns, some noise, and some columns ten times larger."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=torch.Generator().manual_seed(99))
    x = torch.randn(tokens, columns // 4, generator=generator) @ mixing / columns**0.5
    x += 0.1 * torch.randn(tokens, columns, generator=generator)
    x[:, ::37] *= 10
    return x


def weight(rows: int, columns: int, seed: int = 1) -> Tensor:
    """[rows, columns], with a few large values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, columns, generator=generator).add(0.2)


def unseen(columns: int = 128) -> Moments:
    """Of inputs that no method has seen."""
    return Moments.of([inputs(256, columns, seed=5)])


def problem(rows: int = 48, columns: int = 128, spec: GridSpec = W4, foldable: bool = True) -> Problem:
    """A linear that stands alone: a solution does the harm that its errors are on unseen inputs."""
    found = Problem(
        weight=weight(rows, columns),
        inputs=Moments.of([inputs(512, columns)]),
        spec=spec,
        harm=lambda solution: solution.error(found, unseen(columns)),
        settled=(lambda scale: scale) if foldable else None,
    )
    return found
