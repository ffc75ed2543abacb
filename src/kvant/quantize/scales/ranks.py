"""How tensor-parallel ranks share a layer's steps, by vLLM's rule.

Rank r of n keeps the steps of its own KV heads: an equal part of them, in order, or, where there are fewer heads than
ranks, the head r * kv_heads // n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvant.errors import ConfigError, CorruptModelError


def split(step: Tensor, num_ranks: int) -> list[Tensor]:
    """Each rank's part of a step [kv_heads]; a step [1] for all heads goes to every rank as a scalar.

    Raises:
        ConfigError: the heads do not divide over the ranks.
    """
    if step.numel() == 1:
        return [step[0]] * num_ranks
    if not _divides(num_ranks, step.numel()):
        raise ConfigError(
            f"{step.numel()} KV heads cannot be split over a tensor-parallel size of {num_ranks}; choose a divisor or "
            f"a multiple of {step.numel()}"
        )
    return [step[_heads_of(rank, num_ranks, step.numel())] for rank in range(num_ranks)]


def join(parts: Sequence[Tensor], num_kv_heads: int, where: str) -> Tensor:
    """A layer's step, [1] or [kv_heads], from every rank's part.

    Args:
        parts: for each rank a scalar, for all of its KV heads, or one value for each of them.
        num_kv_heads: of the whole layer.
        where: file and layer, for the error.

    Raises:
        CorruptModelError: a part has not one value a head, or two ranks hold one head and disagree.
    """
    if all(part.ndim == 0 and part == parts[0] for part in parts):
        return parts[0].reshape(1)
    if not _divides(len(parts), num_kv_heads):
        raise CorruptModelError(
            f"{where}: {num_kv_heads} KV heads cannot be split over its {len(parts)} ranks; use the scales that were "
            "made for this model"
        )
    step = torch.full((num_kv_heads,), torch.nan)
    for rank, part in enumerate(parts):
        held = step[_heads_of(rank, len(parts), num_kv_heads)]
        if part.ndim and part.shape != held.shape:
            raise CorruptModelError(
                f"{where}: rank {rank} has {part.numel()} scales for {held.numel()} KV heads; give one for all of them "
                "or one for each"
            )
        if (~held.isnan() & (held != part)).any():
            raise CorruptModelError(
                f"{where}: ranks {rank - 1} and {rank} hold the same KV head and give {held.item():g} and "
                f"{part.item():g} as its scale; write the file again"
            )
        held.copy_(part)
    return step


def _heads_of(rank: int, num_ranks: int, num_kv_heads: int) -> slice:
    first = rank * num_kv_heads // num_ranks
    return slice(first, max(first + 1, (rank + 1) * num_kv_heads // num_ranks))


def _divides(num_ranks: int, num_kv_heads: int) -> bool:
    return num_kv_heads % num_ranks == 0 or num_ranks % num_kv_heads == 0
