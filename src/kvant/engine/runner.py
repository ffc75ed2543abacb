"""Carries a plan out: copies, decoder, sampler. It decides no policy."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kvant.cache.store import KVStore, SwapSpace
from kvant.engine.batch import build_batch
from kvant.engine.sampler import Sampler, token_logprobs
from kvant.engine.sequence import Plan, Row, Sampled
from kvant.models.decoder import Decoder

_LOGIT_ROWS_AT_ONCE = 64  # bounds the logits of prompt_logprobs


class Runner:
    """A decoder with its KV store and swap space."""

    def __init__(self, decoder: Decoder, store: KVStore, swap: SwapSpace) -> None:
        self._decoder = decoder
        self._store = store
        self._swap = swap
        self._sampler = Sampler(decoder.ops)

    @torch.inference_mode()
    def run(self, plan: Plan) -> list[Sampled]:
        """Copy the plan's blocks, compute its tokens, write their KV, and draw the tokens it asks for."""
        self._swap.swap_out(plan.swaps_out)
        self._store.copy_blocks(plan.copies)
        self._swap.swap_in(plan.swaps_in)
        batch = build_batch(plan, self._store.paging, self._decoder.spec.length_rope)
        hidden = self._decoder.forward(batch.ids, batch.attention, batch.rope_lengths, self._store.layers)
        spans = list(pairwise(batch.attention.query_starts))
        for row, (start, stop) in zip(plan.rows, spans, strict=True):
            self._collect_prompt_logprobs(row, hidden[start:stop])
        ends = [stop - 1 for row, (_, stop) in zip(plan.rows, spans, strict=True) for _ in row.samplers]
        if not ends:
            return []
        samplers = [sequence for row in plan.rows for sequence in row.samplers]
        return self._sampler(self._decoder.logits(hidden[ends]), samplers)

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
