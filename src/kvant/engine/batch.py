"""A plan as tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    def to(self, device: torch.device) -> Batch:
        """The same on another device; itself on the host, where it is made."""
        if device.type == "cpu":
            return self
        attention = self.attention
        moved = replace(
            attention,
            positions=_sent(attention.positions, device),
            slots=_sent(attention.slots, device),
            block_tables=_sent(attention.block_tables, device),
        )
        return Batch(_sent(self.ids, device), moved, _sent(self.rope_lengths, device))


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """On its way to a device, from memory that this can read by itself."""
    return x.pin_memory().to(device, non_blocking=True)


def build_batch(plan: Plan, paging: Paging, rope: RopeSpec | None) -> Batch:
    """The tensors of a step, on the host.

    Args:
        plan: the step. A row's last token may still be unknown; its id is then 0.
        paging: where tokens lie in blocks.
        rope: the rotary embedding that depends on the prompt's length, if there is one.
    """
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
    ids = torch.tensor([token for row in rows for token in _ids(row)])
    lengths = positions + 1 if rope is None else torch.tensor([n for row in rows for n in _lengths(row, rope)])
    return Batch(ids, attention, lengths)


def _ids(row: Row) -> list[int]:
    known = row.sequence.tokens(row.start, row.stop)
    return known + [0] * (row.stop - row.start - len(known))


def _lengths(row: Row, rope: RopeSpec) -> list[int]:
    prompt = len(row.sequence.request.prompt)
    return [rope_length(rope, prompt, position) for position in range(row.start, row.stop)]
