"""What the three oracles share: RMS norm, rotation, causal attention. One text at a time, everything float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [T, N] over its root mean square, times the weight [N]."""
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def dynamic_base(base: float, dim: int, factor: float, original_length: int, length: int) -> float:
    """The NTK-aware base of a text of `length` tokens, stretched beyond the original context only."""
    if length <= original_length:
        return base
    stretch = factor * length / original_length - (factor - 1)
    return float(base * stretch ** (dim / (dim - 2)))


def rotate(x: Tensor, bases: list[float], dim: int) -> Tensor:
    """x [T, heads, D]: in each head the pairs (i, i + dim / 2) turn by position * bases[position] ** (-2 i / dim)."""
    angles = torch.tensor([[p * base ** (-2 * i / dim) for i in range(dim // 2)] for p, base in enumerate(bases)])
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v [T, heads, D] -> [T, heads * D]; each token attends to itself and to all before it."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
