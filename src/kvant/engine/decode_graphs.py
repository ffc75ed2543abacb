"""Decode steps as recorded graphs, by the batch's size: for small batches, launching is most of the time.

A step's numbers are copied into one buffer in one piece, the batch is padded to the size that a graph was recorded for,
and what is beyond the batch writes into a block of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvant.cache.blocks import Paging
from kvant.cache.store import KVStore
from kvant.engine.batch import Batch
from kvant.engine.recorder import Recorder, Replay
from kvant.kernels.ops import AttentionBatch
from kvant.kernels.transfer import sent
from kvant.models.decoder import Decoder

logger = logging.getLogger("kvant")

_NUMBERS = 5  # a sequence's id, position, slot, rope length and context length


def batch_sizes(largest: int) -> tuple[int, ...]:
    """The sizes that are recorded: small ones closely, where padding costs most, then every sixteenth.

    Between 1 and `largest`, which is one of them.
    """
    sizes = {1, 2, 4, 8, *range(16, largest + 1, 16), largest}
    return tuple(sorted(size for size in sizes if size <= largest))


@dataclass(frozen=True)
class _Fixed:
    """The memory of all graphs: the step's numbers as they arrive, the tables, and what comes out."""

    numbers: Tensor
    tables: Tensor
    logits: Tensor


class DecodeGraphs:
    """A decoder's decode steps, recorded for some batch sizes when it is made.

    Args:
        decoder: the model.
        store: its KV store; `spare_block` is one of its blocks that no sequence has.
        spare_block: see there.
        logits: [max_num_seqs, vocab] float32, where steps leave theirs.
        max_model_len: the longest context.
        recorder: how a step is recorded.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: KVStore,
        *,
        spare_block: int,
        logits: Tensor,
        max_model_len: int,
        recorder: Recorder,
    ) -> None:
        device, width = decoder.ops.device, store.paging.blocks_for(max_model_len)
        max_num_seqs = len(logits)
        self._decoder = decoder
        self._store = store
        self._longest = max_model_len
        self._padding = _padding(spare_block, store.paging, max_num_seqs)
        self._tables: Tensor | None = None  # as they are on the device
        self._fixed = _Fixed(
            numbers=torch.zeros(_NUMBERS * max_num_seqs, dtype=torch.int64, device=device),
            tables=torch.full((max_num_seqs, width), spare_block, dtype=torch.int64, device=device),
            logits=logits,
        )
        self._sizes = batch_sizes(max_num_seqs)
        logger.info("recording decode steps for %d batch sizes up to %d", len(self._sizes), max_num_seqs)
        # The largest first: the others fit in its memory.
        self._steps: Mapping[int, _Step] = {size: self._record(size, recorder) for size in reversed(self._sizes)}

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes that are recorded, in order."""
        return self._sizes

    def fits(self, batch: Batch, ends: list[int]) -> bool:
        """Whether a step is one that is recorded: every sequence computes one token, and its logits are asked for."""
        count = len(batch.ids)
        alone = count == len(batch.attention.context_lens) and ends == list(range(count))
        return alone and count <= self.sizes[-1]

    @torch.inference_mode()
    def run(self, batch: Batch, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """A step's logits [T, vocab] float32, and [T] int32 that is not 0 where a key or value is not finite.

        Both are valid until the next run.

        Args:
            batch: of the host; `fits` has taken it.
            ids: [T] int64 on the device, in place of the batch's.
        """
        count = len(batch.ids)
        size = next(size for size in self.sizes if size >= count)
        step = self._steps[size]
        self._fill(batch, size)
        if ids is not None:
            self._fixed.numbers[:count] = ids
        step.replay()
        return self._fixed.logits[:count], step.attention.not_finite[:count]

    def _fill(self, batch: Batch, size: int) -> None:
        count, attention = len(batch.ids), batch.attention
        device = self._fixed.numbers.device
        numbers = self._padding[:, :size].clone()
        rows = (batch.ids, attention.positions, attention.slots, batch.rope_lengths, attention.lengths)
        for row, values in enumerate(rows):
            numbers[row, :count] = values
        tables, known = attention.block_tables, self._tables
        if known is not None and torch.equal(known, tables):
            [there] = sent([numbers], device)
        else:
            self._tables = tables
            there, moved = sent([numbers, tables], device)
            self._fixed.tables[:count, : tables.shape[1]] = moved
        self._fixed.numbers[: _NUMBERS * size] = there.flatten()
        if count < size:
            # A row beyond the batch has one token of context, in its first block.
            self._fixed.tables[count:size, 0] = int(self._padding[2, 0]) // self._store.paging.block_size

    def _record(self, size: int, recorder: Recorder) -> _Step:
        ids, positions, slots, rope_lengths, lengths = self._fixed.numbers[: _NUMBERS * size].view(_NUMBERS, size)
        attention = AttentionBatch(
            positions=positions,
            slots=slots,
            query_starts=tuple(range(size + 1)),
            context_lens=(self._longest,) * size,
            block_tables=self._fixed.tables[:size],
        )
        # Made now, so that the graph has their addresses; it does not keep them.
        assert len(attention.starts) == size + 1
        context, not_finite = attention.lengths, attention.not_finite
        logits = self._fixed.logits[:size]

        def step() -> None:
            context.copy_(lengths)
            not_finite.zero_()
            hidden = self._decoder.forward(ids, attention, rope_lengths, self._store.layers)
            logits.copy_(self._decoder.logits(hidden))

        self._fill_with_padding(size)
        with torch.inference_mode():
            return _Step(recorder(step), attention)

    def _fill_with_padding(self, size: int) -> None:
        """Recording runs the step too: on nobody's tokens."""
        self._fixed.numbers[: _NUMBERS * size] = self._padding[:, :size].flatten().to(self._fixed.numbers.device)


@dataclass(frozen=True)
class _Step:
    """A recorded step, and the batch that it computes: memory that it reads, and where it marks what is not finite."""

    replay: Replay
    attention: AttentionBatch


def _padding(block: int, paging: Paging, count: int) -> Tensor:
    """The numbers of rows that are nobody's, [_NUMBERS, count]: token 0, at the beginning of a text of one token."""
    column = torch.tensor([0, 0, block * paging.block_size + paging.lead, 1, 1])
    return column.unsqueeze(1).expand(-1, count).contiguous()
