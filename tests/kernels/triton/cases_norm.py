"""Norms of real models: of their hidden sizes, and of single heads within a projection of queries, keys and values."""

from __future__ import annotations

from typing import Any

import torch

from kvant.formats.weight import InputCodes
from kvant.kernels.triton import norm
from tests.kernels.triton.compile import Case

HALF = torch.bfloat16


def _rows(ops: Any, width: int) -> None:
    x = torch.zeros(64, width, dtype=HALF)
    ops.add_rms_norm(x, x, torch.ones(width), 1e-6)


def _heads(ops: Any, heads: int, dim: int) -> None:
    projected = torch.zeros(64, heads + 16, dim, dtype=HALF)
    ops.rms_norm(projected[:, :heads], torch.ones(dim), 1e-6)


def _rounded(scale: torch.Tensor | None) -> None:
    x = torch.zeros(64, 4096, dtype=HALF)
    norm.rounded_add_rms_norm(x, x, torch.ones(4096), 1e-6, InputCodes(scale))


CASES = (
    Case("add_rms_norm 4096", lambda ops: _rows(ops, 4096)),
    Case("rms_norm of heads 32x128", lambda ops: _heads(ops, 32, 128)),
    Case("add_rms_norm 4096 rounded, each token's scale", lambda ops: _rounded(None)),
    Case("add_rms_norm 4096 rounded, measured scale", lambda ops: _rounded(torch.ones(1)), slow=True),
    Case("add_rms_norm 896", lambda ops: _rows(ops, 896), slow=True),
    Case("add_rms_norm 5120", lambda ops: _rows(ops, 5120), slow=True),
    Case("add_rms_norm 18432", lambda ops: _rows(ops, 18432), slow=True),
    Case("rms_norm of heads 8x256", lambda ops: _heads(ops, 8, 256), slow=True),
)
