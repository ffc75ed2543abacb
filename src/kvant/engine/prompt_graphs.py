"""Steps that read prompts as recorded graphs, by the number of their tokens.

Hundreds of launches take longer than a GPU needs for a prompt of a chat, and what decodes in the same step waits for
it. Which sequence a token belongs to is a number like others: kernels look it up where it lies.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from kvant.cache.store import KVStore
from kvant.engine.batch import Batch
from kvant.engine.recorder import Recorder, Replay
from kvant.kernels.ops import AttentionBatch
from kvant.kernels.transfer import sent
from kvant.models.decoder import Decoder

logger = logging.getLogger("kvant")

# Larger steps take a GPU longer than their launches take the host.
_SIZES = (32, 64, 128, 192, 256, 384, 512, 768, 1024)
_TOKENS_A_PROMPT = 16  # of a recorded step: as many prompts may be in it. Attention has programs for each.
_PER_TOKEN = 4  # a token's id, position, slot and rope length


def prompt_sizes(max_tokens: int, max_num_seqs: int) -> dict[int, int]:
    """The numbers of tokens that are recorded, up to `max_tokens`, and the most sequences that may share each."""
    return {size: min(size // 2, max_num_seqs) for size in _SIZES if size <= max_tokens}


def most_prompts(size: int, sequences: int) -> int:
    """How many of the sequences of a recorded step may have more than one new token."""
    return min(size // _TOKENS_A_PROMPT, sequences)


def starts_of(size: int, sequences: int) -> tuple[int, ...]:
    """Where sequences with `size` new tokens begin, and the last ends, for launches that serve any step of this size.

    One has almost all of them, as many others two as may be prompts, and one, unless it is alone, a single token. So
    there may be a prompt less than `most_prompts`: attention's launches serve one more than they were made for.
    """
    prompts = max(1, min(most_prompts(size, sequences), sequences - 1))
    counts = [2] * (prompts - 1) + [1] * (prompts < sequences)
    counts += [0] * (sequences - 1 - len(counts))
    return (0, *accumulate([size - sum(counts), *counts]))


class PromptGraphs:
    """A decoder's steps of prompts, chunks and decodes, recorded for some numbers of tokens when it is made.

    Args:
        decoder: the model.
        store: its KV store; `spare_block` is one of its blocks that no sequence has.
        spare_block: see there.
        logits: [max_num_seqs, vocab] float32, where steps leave theirs.
        max_tokens: of a step.
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
        max_tokens: int,
        max_model_len: int,
        recorder: Recorder,
    ) -> None:
        sizes = prompt_sizes(max_tokens, len(logits))
        most = _Numbers.room(max(sizes, default=0), max(sizes.values(), default=0))
        width = store.paging.blocks_for(max_model_len)
        self._decoder = decoder
        self._store = store
        self._longest = max_model_len
        self._spare = spare_block
        self._logits = logits
        self._numbers = torch.zeros(most, dtype=torch.int64, device=logits.device)
        # Rows beyond a batch are looked at too: they name blocks that exist.
        self._tables = torch.full((len(logits), width), spare_block, dtype=torch.int64, device=logits.device)
        logger.info("recording steps with prompts for %d numbers of tokens", len(sizes))
        # The largest first: the others fit in its memory.
        self._steps: Mapping[int, _Step] = {
            size: self._record(size, sizes[size], recorder) for size in sorted(sizes, reverse=True)
        }

    @torch.inference_mode()
    def run(self, batch: Batch, ends: list[int]) -> tuple[Tensor, Tensor] | None:
        """The logits [R, vocab] float32 of the tokens `ends`, and [T] int32, not 0 where a key or value is not finite.

        Both are valid until the next run. None where no such step is recorded.

        Args:
            batch: of the host.
            ends: R of its tokens.
        """
        size = self._size(batch, ends)
        if size is None:
            return None
        step = self._steps[size]
        self._fill(batch, ends, size, step.sequences)
        step.replay()
        return self._logits[: len(ends)], step.attention.not_finite[: len(batch.ids)]

    def _size(self, batch: Batch, ends: list[int]) -> int | None:
        """The least that is recorded and holds so many tokens, prompts, sequences and logits."""
        tokens, rows = len(batch.ids), max(len(batch.attention.context_lens), len(ends))
        prompts = sum(stop - start > 1 for start, stop in pairwise(batch.attention.query_starts))

        def fits(size: int, sequences: int) -> bool:
            return size >= tokens and sequences >= rows and most_prompts(size, sequences) >= prompts

        return min((size for size, step in self._steps.items() if fits(size, step.sequences)), default=None)

    def _fill(self, batch: Batch, ends: list[int], size: int, sequences: int) -> None:
        attention, tokens, count = batch.attention, len(batch.ids), len(batch.attention.context_lens)
        numbers = torch.zeros(_Numbers.room(size, sequences), dtype=torch.int64)
        views = _Numbers.over(numbers, size, sequences)
        # What is beyond the batch: tokens of nobody, and sequences without new tokens.
        views.slots.fill_(self._spare * self._store.paging.block_size + self._store.paging.lead)
        views.starts.fill_(tokens)
        rows = (batch.ids, attention.positions, attention.slots, batch.rope_lengths)
        for view, values in zip((views.ids, views.positions, views.slots, views.rope_lengths), rows, strict=True):
            view[:tokens] = values
        views.starts[: count + 1] = torch.tensor(attention.query_starts)
        views.lengths[:count] = torch.tensor(attention.context_lens)
        views.ends[: len(ends)] = torch.tensor(ends, dtype=torch.int64)
        there, tables = sent([numbers, attention.block_tables], self._numbers.device)
        self._numbers[: len(numbers)] = there
        self._tables[:count, : tables.shape[1]] = tables

    def _record(self, size: int, sequences: int, recorder: Recorder) -> _Step:
        numbers = self._numbers[: _Numbers.room(size, sequences)]
        self._pretend(size, sequences)
        views = _Numbers.over(numbers, size, sequences)
        attention = AttentionBatch(
            positions=views.positions,
            slots=views.slots,
            query_starts=starts_of(size, sequences),
            context_lens=(self._longest,) * sequences,
            block_tables=self._tables[:sequences],
        )
        # Made now, so that the graph has their addresses; it does not keep them.
        starts, lengths, not_finite = attention.starts, attention.lengths, attention.not_finite
        logits = self._logits[:sequences]

        def step() -> None:
            starts.copy_(views.starts)
            lengths.copy_(views.lengths)
            not_finite.zero_()
            hidden = self._decoder.forward(views.ids, attention, views.rope_lengths, self._store.layers, views.ends)
            logits.copy_(self._decoder.logits(hidden))

        with torch.inference_mode():
            return _Step(recorder(step), attention, sequences)

    def _pretend(self, size: int, sequences: int) -> None:
        """Recording runs the step too: on a prompt of nobody's, all in one slot."""
        numbers = torch.zeros(_Numbers.room(size, sequences), dtype=torch.int64)
        views = _Numbers.over(numbers, size, sequences)
        views.slots.fill_(self._spare * self._store.paging.block_size + self._store.paging.lead)
        self._numbers[: len(numbers)] = numbers.to(self._numbers.device)


@dataclass(frozen=True)
class _Numbers:
    """A step's numbers in one piece of memory: of T tokens, and of S sequences."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    rope_lengths: Tensor
    starts: Tensor
    lengths: Tensor
    ends: Tensor

    @staticmethod
    def room(tokens: int, sequences: int) -> int:
        """How many there are."""
        return _PER_TOKEN * tokens + 3 * sequences + 1

    @classmethod
    def over(cls, numbers: Tensor, tokens: int, sequences: int) -> _Numbers:
        """Views of them; `starts` has one more than there are sequences."""
        return cls(*numbers.split([tokens] * _PER_TOKEN + [sequences + 1, sequences, sequences]))


@dataclass(frozen=True)
class _Step:
    """A recorded step, the batch that it computes, which is memory that it reads, and how many sequences it has."""

    replay: Replay
    attention: AttentionBatch
    sequences: int
