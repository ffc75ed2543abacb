"""Rows of matrices, as values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvant.kernels.triton.span_codes import meant, values, word_of
from kvant.kernels.triton.weights import WORDS, Dense, RowCodes, SpanCodes, TritonWeight

_FEW, _MANY = 16, 64  # rows of a program, for some of a matrix and for all


def embedding(ids: Tensor, weight: TritonWeight) -> Tensor:
    """`Ops.embedding`: ids [T] int64 -> [T, K], in the dtype of a plain matrix; float32 where it is codes."""
    if isinstance(weight, Dense):
        return F.embedding(ids, weight.matrix)
    if isinstance(weight, RowCodes):
        return _rows_of(weight, ids)
    out = torch.empty(len(ids), weight.shape[1], dtype=torch.float32, device=weight.words.device)
    return _launch(weight, out, ids, weight.order)


def expanded(weight: SpanCodes, dtype: torch.dtype) -> Tensor:
    """The whole matrix [N, K], columns and scales as they are stored, computed in float32 and rounded to `dtype`."""
    return _launch(weight, torch.empty(weight.shape, dtype=dtype, device=weight.words.device), None, None)


def _rows_of(weight: RowCodes, ids: Tensor) -> Tensor:
    values = weight.codes[ids, : weight.shape[1]].float() * weight.scale[ids].unsqueeze(1)
    return values if weight.order is None else torch.empty_like(values).index_copy_(1, weight.order, values)


def _launch(weight: SpanCodes, out: Tensor, ids: Tensor | None, order: Tensor | None) -> Tensor:
    (n, k), count = weight.shape, out.shape[0]
    rows = _MANY if ids is None else _FEW
    piece = min(WORDS, weight.group)
    grid = (-(-k // weight.span) * (WORDS // piece), triton.cdiv(count, rows))
    if count:
        _rows[grid](
            weight.words, weight.steps, weight.unit, ids, order, out, count, n, k, triton.cdiv(k, weight.group),
            BITS=weight.bits, GROUP=weight.group, KIND=weight.kind, WORDS=WORDS, PIECE=piece, ROWS=rows,
        )  # fmt: skip
    return out


@triton.jit
def _rows(
    words, steps, unit, ids, order, out, count, n, k, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, WORDS: tl.constexpr, PIECE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A program: PIECE words, whose codes at a place share a scale, of some rows. ids and order may be None."""
    PLACES: tl.constexpr = 16 // BITS
    APART: tl.constexpr = WORDS // PIECE
    span, first = tl.program_id(0) // APART, tl.program_id(0) % APART * PIECE
    row, j = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, PIECE)
    inside = row < count
    source = row if ids is None else tl.load(ids + row, inside, other=0).to(tl.int32)
    at = (span.to(tl.int64) * n + source)[:, None] * WORDS + first + j[None, :]
    packed = tl.load(words + at, inside[:, None], other=0)
    for place in tl.static_range(PLACES):
        start = (span * PLACES + place) * WORDS + first
        column, group = start + j, start // GROUP
        word = word_of(steps, group, groups, n, source, inside, KIND, APART)
        scale, zero, bias = meant(word, group, groups, KIND, BITS, APART)
        found = values(packed, zero, scale, bias, place, tl.float32, BITS, False) * unit
        held = column < k
        target = column if order is None else tl.load(order + column, held, other=0)
        to = out + row.to(tl.int64)[:, None] * k + target[None, :]
        tl.store(to, found.to(out.dtype.element_ty), inside[:, None] & held[None, :])
