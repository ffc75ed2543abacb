"""A plan as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvant.cache.blocks import Paging
from kvant.engine.sequence import Plan, Row
from kvant.kernels.ops import AttentionBatch
from kvant.models.rope import rope_length
from kvant.models.spec import RopeSpec


@dataclass(frozen=True)
class Batch:
    """What the decoder takes: ids and rope_lengths [T] int64, and the attention's view of the same tokens."""

    ids: Tensor
    attention: AttentionBatch
    rope_lengths: Tensor


def build_batch(plan: Plan, paging: Paging, rope: RopeSpec | None) -> Batch:
    """The tensors of a step; `rope` is the rotary embedding that depends on the prompt's length, if there is one."""
    rows = plan.rows
    positions = torch.cat([torch.arange(row.start, row.stop) for row in rows])
    slots, block_size = positions + paging.lead, paging.block_size
    width = max(len(row.sequence.blocks) for row in rows)
    tables = torch.tensor([row.sequence.blocks + [0] * (width - len(row.sequence.blocks)) for row in rows])
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([row.stop - row.start for row in rows]))
    attention = AttentionBatch(
        positions=positions,
        slots=tables[owner, slots // block_size] * block_size + slots % block_size,
        query_starts=tuple(accumulate((row.stop - row.start for row in rows), initial=0)),
        context_lens=tuple(row.stop for row in rows),
        block_tables=tables,
    )
    ids = torch.tensor([token for row in rows for token in row.sequence.tokens(row.start, row.stop)])
    lengths = positions + 1 if rope is None else torch.tensor([n for row in rows for n in _lengths(row, rope)])
    return Batch(ids, attention, lengths)


def _lengths(row: Row, rope: RopeSpec) -> list[int]:
    prompt = len(row.sequence.request.prompt)
    return [rope_length(rope, prompt, position) for position in range(row.start, row.stop)]
