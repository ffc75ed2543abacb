"""A plan as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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
_FEW = 64  # tokens; from here on arrays are faster than lists


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
    tables = _block_tables(rows)
    few_decoded = plan.num_tokens == len(rows) <= _FEW
    owner, positions, slots = _few_decoded(rows, paging) if few_decoded else _spread(rows, tables, paging)
    attention = AttentionBatch(
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        query_starts=tuple(accumulate([row.stop - row.start for row in rows], initial=0)),
        context_lens=tuple([row.stop for row in rows]),
        block_tables=torch.from_numpy(tables),
    )
    ids = _ids(rows) if known else np.zeros_like(positions)
    return Batch(torch.from_numpy(ids), attention, _rope_lengths(rows, owner, attention.positions, rope))


def _ids(rows: Sequence[Row]) -> Numbers:
    return np.array([token for sequence, start, stop, _ in rows for token in sequence.tokens(start, stop)])


def _block_tables(rows: Sequence[Row]) -> Numbers:
    """[S, max_blocks], padded with block 0."""
    held = [row.sequence.blocks for row in rows]
    width = max(map(len, held)) * held[0].itemsize
    tables = bytearray().join([blocks.tobytes().ljust(width, b"\0") for blocks in held])
    return np.frombuffer(tables, dtype=np.int64).reshape(len(rows), -1)


def _few_decoded(rows: Sequence[Row], paging: Paging) -> tuple[slice, Numbers, Numbers]:
    """As `_spread`, for rows of one token, without arrays: a step of a small model has no time for them."""
    lead, size = paging.lead, paging.block_size
    places = [(sequence.blocks, start + lead) for sequence, start, _, _ in rows]
    slots = [blocks[place // size] * size + place % size for blocks, place in places]
    return slice(None), np.array([row.start for row in rows]), np.array(slots)


def _spread(rows: Sequence[Row], tables: Numbers, paging: Paging) -> tuple[Numbers, Numbers, Numbers]:
    """Of each token, all [T]: its row, its position, its slot."""
    firsts, stops = np.array([row.start for row in rows]), np.array([row.stop for row in rows])
    owner = np.repeat(np.arange(len(rows)), stops - firsts)
    positions = np.arange(len(owner)) + (stops - np.cumsum(stops - firsts))[owner]
    block, offset = np.divmod(positions + paging.lead, paging.block_size)
    return owner, positions, tables[owner, block] * paging.block_size + offset


def _rope_lengths(rows: Sequence[Row], owner: Numbers | slice, positions: Tensor, rope: RopeSpec | None) -> Tensor:
    if rope is None:
        return positions + 1
    prompts = np.array([len(row.sequence.request.prompt) for row in rows])
    return rope_lengths(rope, torch.from_numpy(prompts[owner]), positions)
