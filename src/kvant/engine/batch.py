"""A plan as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvant.cache.blocks import Paging
from kvant.engine.sequence import Plan, Row
from kvant.kernels.ops import AttentionBatch
from kvant.models.rope import rope_lengths
from kvant.models.spec import RopeSpec

Numbers = NDArray[np.int64]


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
        attention, (ids, lengths) = self.attention.to(device, self.ids, self.rope_lengths)
        return Batch(ids, attention, lengths)


def build_batch(plan: Plan, paging: Paging, rope: RopeSpec | None, known: bool = True) -> Batch:
    """The tensors of a step, on the host.

    Args:
        plan: the step.
        paging: where tokens lie in blocks.
        rope: the rotary embedding that depends on the prompt's length, if there is one.
        known: whether the tokens are; else their ids are 0.
    """
    rows = plan.rows
    firsts, stops = np.array([row.start for row in rows]), np.array([row.stop for row in rows])
    ends = np.cumsum(stops - firsts)
    owner = np.repeat(np.arange(len(rows)), stops - firsts)
    positions = np.arange(ends[-1]) + (stops - ends)[owner]
    slots, block_size = positions + paging.lead, paging.block_size
    tables = _block_tables(rows)
    attention = AttentionBatch(
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(tables[owner, slots // block_size] * block_size + slots % block_size),
        query_starts=(0, *ends.tolist()),
        context_lens=tuple(stops.tolist()),
        block_tables=torch.from_numpy(tables),
    )
    ids = np.array([token for row in rows for token in _ids(row)]) if known else np.zeros_like(positions)
    return Batch(torch.from_numpy(ids), attention, _rope_lengths(rows, owner, attention.positions, rope))


def _block_tables(rows: Sequence[Row]) -> Numbers:
    """[S, max_blocks], padded with block 0."""
    held = [row.sequence.blocks for row in rows]
    counts = np.array([len(blocks) for blocks in held])
    tables = np.zeros((len(rows), counts.max()), dtype=np.int64)
    tables[np.arange(tables.shape[1]) < counts[:, None]] = np.frombuffer(b"".join(held), dtype=np.int64)
    return tables


def _ids(row: Row) -> list[int]:
    sequence, start, stop, _ = row
    decodes = stop == start + 1 == sequence.total and sequence.output
    return sequence.output[-1:] if decodes else sequence.tokens(start, stop)


def _rope_lengths(rows: Sequence[Row], owner: Numbers, positions: Tensor, rope: RopeSpec | None) -> Tensor:
    if rope is None:
        return positions + 1
    prompts = np.array([len(row.sequence.request.prompt) for row in rows])
    return rope_lengths(rope, torch.from_numpy(prompts[owner]), positions)
