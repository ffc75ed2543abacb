"""Carries a plan out: copies, decoder, sampler. It decides no policy."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvant.cache.store import KVStore, SwapSpace
from kvant.engine.batch import Batch, build_batch
from kvant.engine.graphs import StepGraphs
from kvant.engine.logprobs import logprob_rows, told
from kvant.engine.sampler import Sampler, sampling_batch
from kvant.engine.sequence import Plan, Row, Sampled, Sequence
from kvant.formats.kv import check_finite
from kvant.kernels.burst import Burst, Interrupt
from kvant.kernels.transfer import fetched, sent
from kvant.models.decoder import Decoder

_BURST_SECONDS = 0.05  # twenty times a second, text looks as if it came without a pause
_LOGIT_ROWS_AT_ONCE = 64  # bounds the logits of prompt_logprobs


@dataclass(frozen=True)
class Flight:
    """A step on its way: a device may still be computing it.

    Attributes:
        plan: what is computed.
        samplers: whom it draws tokens for.
        tokens: [R] int64 on the device, theirs in order; of a burst, [steps, R].
    """

    plan: Plan
    samplers: List[Sequence]
    tokens: Tensor
    _arriving: _Arriving
    _arrived: torch.cuda.Event | None

    def sampled(self) -> list[list[Sampled]]:
        """The tokens of each step, as soon as they are known.

        Raises:
            NotFiniteError: a key or a value of the step is not finite; it names the tokens.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        arrived = self._arriving
        if arrived.not_finite is not None:
            check_finite(arrived.not_finite == 0)
        steps = arrived.tokens.view(-1, len(self.samplers)).tolist() if self.samplers else [[]]
        sampled = [list(map(Sampled, self.samplers, tokens)) for tokens in steps]
        if arrived.logprobs is not None:
            for row, numbers in zip(_reporting(self.samplers), arrived.logprobs.tolist(), strict=True):
                sequence, token, _ = sampled[0][row]
                top = sequence.request.sampling.logprobs or 0
                sampled[0][row] = Sampled(sequence, token, told(numbers, token, top))
        return sampled


@dataclass(frozen=True)
class _Arriving:
    """What the host waits for: the tokens, `logprob_rows` of those who ask for them, marks beside the plan's tokens."""

    tokens: Tensor
    logprobs: Tensor | None
    not_finite: Tensor | None


class Runner:
    """A decoder with its KV store and swap space; `graphs` has its steps recorded, where a device has such."""

    def __init__(self, decoder: Decoder, store: KVStore, swap: SwapSpace, graphs: StepGraphs | None = None) -> None:
        self.interrupt = Interrupt()  # of bursts
        self._decoder = decoder
        self._store = store
        self._swap = swap
        self._graphs = graphs
        self._sampler = Sampler(decoder.ops)

    def run(self, plan: Plan) -> list[list[Sampled]]:
        """Copy the plan's blocks, compute its tokens, write their KV, and draw the tokens it asks for, step by step."""
        return self.launch(plan).sampled()

    def launch(self, plan: Plan, after: Flight | None = None) -> Flight:
        """As `run`, but it does not wait for the device.

        Args:
            plan: the step.
            after: the step before, where its tokens are not known yet: all rows go on from it.
        """
        self._swap.swap_out(plan.swaps_out)
        self._store.copy_blocks(plan.copies)
        self._swap.swap_in(plan.swaps_in)
        batch = build_batch(plan, self._store.paging, self._decoder.spec.length_rope, known=after is None)
        ids = None if after is None else _following(plan, after)
        samplers = [sequence for row in plan.rows for sequence in row.samplers]
        tokens = self._draw(plan, batch, samplers) if after is None else None
        if tokens is not None:
            return self._flight(plan, samplers, _Arriving(tokens, None, None))
        logits, not_finite = self._compute(plan, batch, ids, samplers)
        if logits is None:
            return self._flight(plan, [], _Arriving(torch.empty(0, dtype=torch.int64), None, not_finite))
        tokens = self._sampler.draw(logits, samplers, ahead=int(after is not None))
        return self._flight(plan, samplers, _Arriving(tokens, self._logprobs(logits, tokens, samplers), not_finite))

    def _draw(self, plan: Plan, batch: Batch, samplers: List[Sequence]) -> Tensor | None:
        """The tokens of steps that decode, where the backend does all of it at once and nobody wants more."""
        if not self._decoder.draws or plan.num_tokens != len(plan.rows):
            return None
        if samplers != [row.sequence for row in plan.rows] or not all(s.wants_a_token_alone for s in samplers):
            return None
        wishes = sampling_batch(samplers, steps=plan.steps)
        stops = [sequence.request.stop_ids for sequence in samplers]
        burst = Burst(plan.steps, stops, _BURST_SECONDS, self.interrupt)
        return self._decoder.draw(batch.ids, batch.attention, batch.rope_lengths, self._store.layers, wishes, burst)

    def _compute(
        self, plan: Plan, batch: Batch, ids: Tensor | None, samplers: List[Sequence]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The logits of those who sample, and which tokens are not finite, where the backend leaves that to be seen."""
        spans = list(pairwise(batch.attention.query_starts))
        ends = [stop - 1 for row, (_, stop) in zip(plan.rows, spans, strict=True) for _ in row.samplers]
        reported = [row for row in plan.rows if row.tells_of_its_prompt]
        if self._graphs is not None and not reported:
            recorded = self._graphs.run(batch, ends, ids)
            if recorded is not None:
                return (recorded[0] if ends else None), recorded[1]
        on_device = batch.to(self._decoder.ops.device)
        ids = on_device.ids if ids is None else ids
        # Each once, as many choices as begin there; one at least, since no kernel takes none.
        wanted = range(len(ids)) if reported else dict.fromkeys(ends or [0])
        rows = _index(list(wanted), len(ids), ids.device)
        hidden = self._decoder.forward(ids, on_device.attention, on_device.rope_lengths, self._store.layers, rows)
        for row, (start, stop) in zip(plan.rows, spans, strict=True):
            if row in reported:
                self._collect_prompt_logprobs(row, hidden[start:stop])
        bad = on_device.attention.reported_not_finite
        if not ends:
            return None, bad
        places = {token: place for place, token in enumerate(wanted)}
        return self._decoder.logits(_chosen(hidden, [places[end] for end in ends])), bad

    def _logprobs(self, logits: Tensor, tokens: Tensor, samplers: List[Sequence]) -> Tensor | None:
        rows = _reporting(samplers)
        if not rows:
            return None
        top = max(samplers[row].request.sampling.logprobs or 0 for row in rows)
        return logprob_rows(_chosen(logits, rows), _chosen(tokens, rows), top)

    def _flight(self, plan: Plan, samplers: List[Sequence], results: _Arriving) -> Flight:
        if self._decoder.ops.device.type == "cpu":
            return Flight(plan, samplers, results.tokens, results, None)
        logprobs = None if results.logprobs is None else fetched(results.logprobs)
        not_finite = None if results.not_finite is None else fetched(results.not_finite)
        arriving = _Arriving(fetched(results.tokens), logprobs, not_finite)
        arrived = torch.cuda.Event()
        arrived.record()
        return Flight(plan, samplers, results.tokens, arriving, arrived)

    def _collect_prompt_logprobs(self, row: Row, hidden: Tensor) -> None:
        """Append what the row's tokens say of the prompt tokens that follow them; a recomputed prompt adds nothing."""
        request = row.sequence.request
        top, found = request.sampling.prompt_logprobs, request.prompt_logprobs
        last = min(row.stop, len(request.prompt) - 1)
        if top is None or len(found) > last:
            return
        for first in range(max(row.start, len(found) - 1), last, _LOGIT_ROWS_AT_ONCE):
            stop = min(first + _LOGIT_ROWS_AT_ONCE, last)
            logits = self._decoder.logits(hidden[first - row.start : stop - row.start])
            tokens = request.prompt[first + 1 : stop + 1]
            rows = logprob_rows(logits, torch.tensor(tokens).to(logits.device), top).tolist()
            found += [told(numbers, token, top) for numbers, token in zip(rows, tokens, strict=True)]


def _reporting(samplers: List[Sequence]) -> list[int]:
    """The rows of those who want log-probabilities."""
    return [row for row, sequence in enumerate(samplers) if sequence.request.sampling.logprobs is not None]


def _chosen(x: Tensor, rows: list[int]) -> Tensor:
    """Some rows of what is on the device; itself where they are all of them in order."""
    index = _index(rows, len(x), x.device)
    return x if index is None else x[index]


def _index(rows: list[int], count: int, device: torch.device) -> Tensor | None:
    """Of some of `count` rows, on a device; None where they are all of them in order."""
    if rows == list(range(count)):
        return None
    [index] = sent([torch.tensor(rows)], device)
    return index


def _following(plan: Plan, before: Flight) -> Tensor:
    """The ids that a plan's rows begin with, one each, as the step before draws them: [T] int64 on the device."""
    drawn = {sequence: row for row, sequence in enumerate(before.samplers)}
    last = before.tokens.view(-1, len(before.samplers))[-1]
    return _chosen(last, [drawn[row.sequence] for row in plan.rows])
