"""Vectors that a cache may be given: ordinary ones, and such as break sloppy arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import torch
from torch import Tensor

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
ORDINARY = st.floats(-10, 10, width=32)
HEAD_DIMS = (64, 80, 96, 128, 192, 256)  # of the families that kvant runs
KINDS = ("ordinary", "constant", "outlier", "narrow", "ragged", "two-valued", "zero")


@st.composite
def drawn_vectors(draw: st.DrawFn, dims: Sequence[int] = (2, 8, 16)) -> Tensor:
    """[kv_heads, tokens, head_dim], few and short, element by element: huge, tiny, constant, mixed, with outliers."""
    heads, tokens, dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from(dims))
    rows = []
    for _ in range(heads * tokens):
        constant = st.builds(lambda value: [value] * dim, FINITE)
        outlier = st.builds(
            lambda row, value: [value, *row[1:]], st.lists(ORDINARY, min_size=dim, max_size=dim), FINITE
        )
        narrow = st.builds(
            lambda at, row: [at + x / 4096 for x in row], FINITE, st.lists(ORDINARY, min_size=dim, max_size=dim)
        )
        mixed = st.lists(FINITE, min_size=dim, max_size=dim)
        rows.append(draw(st.one_of(mixed, constant, outlier, narrow)))
    return torch.tensor(rows, dtype=torch.float64).float().clamp(-3.4e38, 3.4e38).view(heads, tokens, dim)


@st.composite
def vectors(
    draw: st.DrawFn, dims: Sequence[int] = HEAD_DIMS, largest: int = 96, max_tokens: int = 6, max_heads: int = 3
) -> Tensor:
    """[kv_heads, tokens, head_dim] of real sizes, each vector of a kind and a magnitude from 2^-140 to 2^largest."""
    heads, tokens = draw(st.integers(1, max_heads)), draw(st.integers(1, max_tokens))
    dim, generator = draw(st.sampled_from(dims)), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    exponents = st.one_of(st.integers(-3, 5), st.integers(-140, largest - 4))
    rows = [
        vector(draw(st.sampled_from(KINDS)), dim, generator) * 2.0 ** draw(exponents) for _ in range(heads * tokens)
    ]
    return torch.stack(rows).float().view(heads, tokens, dim)


def vector(kind: str, dim: int, generator: torch.Generator) -> Tensor:
    """One vector [dim] float64, its elements hardly larger than 16."""
    x = torch.randn(dim, generator=generator, dtype=torch.float64)
    match kind:
        case "constant":
            return x[:1].expand(dim)
        case "outlier":
            return torch.cat([torch.full((1,), 12.0), x[1:] / 100])[torch.randperm(dim, generator=generator)]
        case "narrow":
            return 3 + x / 4096
        case "ragged":  # magnitudes of all orders
            return x.sign() * torch.exp2(-30 * torch.rand(dim, generator=generator, dtype=torch.float64))
        case "two-valued":
            return x.sign()
        case "zero":
            return torch.zeros(dim, dtype=torch.float64)
        case _:
            return x
