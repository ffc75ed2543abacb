"""A plan as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from kvant.cache.blocks import Paging
from kvant.engine.sequence import Plan, Row
from kvant.kernels.ops import AttentionBatch
from kvant.models.rope import rope_lengths
from kvant.models.spec import RopeSpec

_FEW = 64  # tokens; from here on arrays are faster than lists


@dataclass(frozen=True)
class Batch:
    """What the decoder takes: ids and rope_lengths [T] int64, and the attention's view of the same tokens.

    Where no rotation depends on lengths, rope_lengths are any numbers.
    """

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
    rows, tables = plan.rows, _block_tables(plan.rows)
    few_decoded = plan.num_tokens == len(rows) <= _FEW
    positions, slots = _few_decoded(rows, paging) if few_decoded else _spread(rows, tables, paging)
    attention = AttentionBatch(
        positions=positions,
        slots=slots,
        query_starts=tuple(accumulate([row.stop - row.start for row in rows], initial=0)),
        context_lens=tuple([row.stop for row in rows]),
        block_tables=tables,
    )
    ids = _ids(rows) if known else torch.zeros_like(positions)
    return Batch(ids, attention, positions if rope is None else _rope_lengths(rows, positions, rope))


def _ids(rows: Sequence[Row]) -> Tensor:
    ids = [token for sequence, start, stop, _ in rows for token in sequence.tokens(start, stop)]
    return torch.from_numpy(np.array(ids))


def _block_tables(rows: Sequence[Row]) -> Tensor:
    """[S, max_blocks], padded with block 0."""
    held = [row.sequence.blocks for row in rows]
    width = max(map(len, held)) * held[0].itemsize
    tables = bytearray().join([blocks.tobytes().ljust(width, b"\0") for blocks in held])
    return torch.from_numpy(np.frombuffer(tables, dtype=np.int64).reshape(len(rows), -1))


def _few_decoded(rows: Sequence[Row], paging: Paging) -> tuple[Tensor, Tensor]:
    """As `_spread`, for rows of one token, without arrays: a step of a small model has no time for them."""
    lead, size = paging.lead, paging.block_size
    places = [(sequence.blocks, start + lead) for sequence, start, _, _ in rows]
    slots = [blocks[place // size] * size + place % size for blocks, place in places]
    return torch.from_numpy(np.array([row.start for row in rows])), torch.from_numpy(np.array(slots))


def _spread(rows: Sequence[Row], tables: Tensor, paging: Paging) -> tuple[Tensor, Tensor]:
    """Each token's position and slot, both [T]."""
    firsts, stops = np.array([row.start for row in rows]), np.array([row.stop for row in rows])
    owner = np.repeat(np.arange(len(rows)), stops - firsts)
    positions = np.arange(len(owner)) + (stops - np.cumsum(stops - firsts))[owner]
    block, offset = np.divmod(positions + paging.lead, paging.block_size)
    slots = tables.numpy()[owner, block] * paging.block_size + offset
    return torch.from_numpy(positions), torch.from_numpy(slots)


def _rope_lengths(rows: Sequence[Row], positions: Tensor, rope: RopeSpec) -> Tensor:
    prompts = [len(row.sequence.request.prompt) for row in rows]
    counts = [row.stop - row.start for row in rows]
    return rope_lengths(rope, torch.from_numpy(np.repeat(prompts, counts)), positions)
