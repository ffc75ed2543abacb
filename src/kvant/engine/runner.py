"""Carries a plan out: copies, decoder, sampler. It decides no policy."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvant.cache.store import KVStore, SwapSpace
from kvant.engine.batch import Batch, build_batch
from kvant.engine.graphs import DecodeGraphs
from kvant.engine.sampler import Sampler, reported, token_logprobs
from kvant.engine.sequence import Plan, Row, Sampled, Sequence
from kvant.formats.kv import check_finite
from kvant.models.decoder import Decoder

_LOGIT_ROWS_AT_ONCE = 64  # bounds the logits of prompt_logprobs


@dataclass(frozen=True)
class Flight:
    """A step on its way: a device may still be computing it.

    Attributes:
        plan: what is computed.
        samplers: whom it draws tokens for.
        tokens: [R] int64 on the device, theirs in order.
        logits: [R, vocab], where one of them wants log-probabilities.
    """

    plan: Plan
    samplers: List[Sequence]
    tokens: Tensor
    logits: Tensor | None
    _arriving: Tensor
    _not_finite: Tensor | None
    _arrived: torch.cuda.Event | None

    def sampled(self) -> list[Sampled]:
        """The tokens, as soon as they are known.

        Raises:
            NotFiniteError: a key or a value of the step is not finite; it names the tokens.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        if self._not_finite is not None:
            check_finite(self._not_finite == 0)
        drawn = enumerate(zip(self.samplers, self._arriving.tolist(), strict=True))
        return [
            Sampled(sequence, token, reported(self.logits, row, token, sequence)) for row, (sequence, token) in drawn
        ]


class Runner:
    """A decoder with its KV store and swap space; `graphs` has its decode steps recorded, where a device has such."""

    def __init__(self, decoder: Decoder, store: KVStore, swap: SwapSpace, graphs: DecodeGraphs | None = None) -> None:
        self._decoder = decoder
        self._store = store
        self._swap = swap
        self._graphs = graphs
        self._sampler = Sampler(decoder.ops)

    def run(self, plan: Plan) -> list[Sampled]:
        """Copy the plan's blocks, compute its tokens, write their KV, and draw the tokens it asks for."""
        return self.launch(plan).sampled()

    @torch.inference_mode()
    def launch(self, plan: Plan, after: Flight | None = None) -> Flight:
        """As `run`, but it does not wait for the device.

        Args:
            plan: the step.
            after: the step before, where its tokens are not known yet: all rows go on from it.
        """
        self._swap.swap_out(plan.swaps_out)
        self._store.copy_blocks(plan.copies)
        self._swap.swap_in(plan.swaps_in)
        batch = build_batch(plan, self._store.paging, self._decoder.spec.length_rope)
        ids = None if after is None else _following(plan, after)
        samplers = [sequence for row in plan.rows for sequence in row.samplers]
        logits, not_finite = self._compute(plan, batch, ids)
        if logits is None:
            tokens = torch.empty(0, dtype=torch.int64)
            return self._flight(plan, [], tokens, None, not_finite)
        tokens = self._sampler.draw(logits, samplers, ahead=int(after is not None))
        # Recorded steps will write to the same memory.
        wanted = any(sequence.request.sampling.logprobs is not None for sequence in samplers)
        return self._flight(plan, samplers, tokens, logits.clone() if wanted else None, not_finite)

    def _compute(self, plan: Plan, batch: Batch, ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The logits of those who sample, and which tokens are not finite, where the backend leaves that to be seen."""
        if self._graphs is not None and self._graphs.fits(batch) and all(map(_decodes, plan.rows)):
            return self._graphs.run(batch, ids)
        on_device = batch.to(self._decoder.ops.device)
        ids = on_device.ids if ids is None else ids
        hidden = self._decoder.forward(ids, on_device.attention, on_device.rope_lengths, self._store.layers)
        spans = list(pairwise(batch.attention.query_starts))
        for row, (start, stop) in zip(plan.rows, spans, strict=True):
            self._collect_prompt_logprobs(row, hidden[start:stop])
        ends = [stop - 1 for row, (_, stop) in zip(plan.rows, spans, strict=True) for _ in row.samplers]
        bad = on_device.attention.reported_not_finite
        return self._decoder.logits(hidden[ends]) if ends else None, bad

    def _flight(
        self, plan: Plan, samplers: List[Sequence], tokens: Tensor, logits: Tensor | None, bad: Tensor | None
    ) -> Flight:
        if self._decoder.ops.device.type == "cpu":
            return Flight(plan, samplers, tokens, logits, tokens, bad, None)
        arriving, bad = _fetched(tokens), None if bad is None else _fetched(bad)
        arrived = torch.cuda.Event()
        arrived.record()
        return Flight(plan, samplers, tokens, logits, arriving, bad, arrived)

    def _collect_prompt_logprobs(self, row: Row, hidden: Tensor) -> None:
        """Append what the row's tokens say of the prompt tokens that follow them; a recomputed prompt adds nothing."""
        request = row.sequence.request
        top, found = request.sampling.prompt_logprobs, request.prompt_logprobs
        last = min(row.stop, len(request.prompt) - 1)
        if top is None or len(found) > last:
            return
        for first in range(max(row.start, len(found) - 1), last, _LOGIT_ROWS_AT_ONCE):
            positions = range(first, min(first + _LOGIT_ROWS_AT_ONCE, last))
            logits = self._decoder.logits(hidden[positions.start - row.start : positions.stop - row.start])
            found += [token_logprobs(logits[p - first], request.prompt[p + 1], top) for p in positions]


def _decodes(row: Row) -> bool:
    """Whether nothing but the next token is wanted of it."""
    return row.samplers == (row.sequence,) and row.sequence.request.sampling.prompt_logprobs is None


def _fetched(x: Tensor) -> Tensor:
    """On its way to the host, into memory that the device can write by itself."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _following(plan: Plan, before: Flight) -> Tensor:
    """The ids that a plan's rows begin with, one each, as the step before draws them: [T] int64 on the device."""
    drawn = {sequence: row for row, sequence in enumerate(before.samplers)}
    rows = [drawn[row.sequence] for row in plan.rows]
    if rows == list(range(len(before.samplers))):
        return before.tokens
    return before.tokens[torch.tensor(rows).to(before.tokens.device, non_blocking=True)]
