"""From logits to tokens: what a request asks of its distribution, then the backend's `sample`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as List

import numpy as np
import torch
from torch import Tensor

from kvant.engine.outputs import TokenLogprobs
from kvant.engine.sequence import Sequence
from kvant.kernels.ops import Ops, SamplingBatch


class Sampler:
    """Draws one token for each sequence; its randomness depends on (seed, choice, position) alone."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def draw(self, logits: Tensor, sequences: List[Sequence], ahead: int = 0) -> Tensor:
        """One token for each sequence from its row of logits [R, vocab] float32: [R] int64, on their device.

        Args:
            logits: see above.
            sequences: whose they are.
            ahead: tokens of each that are drawn already, but not known yet.
        """
        wanted = logits
        for row, sequence in enumerate(sequences):
            if _reshapes(sequence):
                wanted = logits.clone() if wanted is logits else wanted
                _reshape(wanted[row], sequence)
        return self._ops.sample(wanted, _sampling_batch(sequences, ahead))


def token_logprobs(logits: Tensor, token: int, top: int) -> TokenLogprobs:
    """The token's log-probability, its rank (1 is the likeliest) and the `top` likeliest; logits [vocab]."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(top, logprobs.shape[-1]))
    rank = int((logprobs > logprobs[token]).sum()) + 1
    return TokenLogprobs(token, float(logprobs[token]), rank, tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def reported(logits: Tensor | None, row: int, token: int, sequence: Sequence) -> TokenLogprobs | None:
    """What the sequence wants to be told of its token; logits [R, vocab], there where a sequence wants it."""
    top = sequence.request.sampling.logprobs
    return None if top is None or logits is None else token_logprobs(logits[row], token, top)


def _reshapes(sequence: Sequence) -> bool:
    sampling = sequence.request.sampling
    return bool(
        sampling.repetition_penalty != 1
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.logit_bias
        or len(sequence.output) < sampling.min_tokens
    )


def _reshape(logits: Tensor, sequence: Sequence) -> None:
    """Penalties, bias and the ban on early ends, in place on one row [vocab]."""
    sampling = sequence.request.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*sequence.request.prompt, *sequence.output}), device=logits.device)
        scores = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
    counts = Counter(sequence.output)
    if counts and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, times = (torch.tensor(list(x), device=logits.device) for x in (counts, counts.values()))
        logits[ids] -= sampling.presence_penalty + sampling.frequency_penalty * times
    for token, bias in (sampling.logit_bias or {}).items():
        logits[token] += bias
    if len(sequence.output) < sampling.min_tokens:
        logits[sorted(sequence.request.stop_ids)] = float("-inf")


def _sampling_batch(sequences: List[Sequence], ahead: int) -> SamplingBatch:
    wishes = [sequence.request.sampling for sequence in sequences]
    return SamplingBatch(
        temperature=torch.tensor([wish.temperature for wish in wishes], dtype=torch.float32),
        top_k=torch.tensor([wish.top_k for wish in wishes]),
        top_p=torch.tensor([wish.top_p for wish in wishes], dtype=torch.float32),
        min_p=torch.tensor([wish.min_p for wish in wishes], dtype=torch.float32),
        uniform=torch.tensor([_uniform(sequence, ahead) for sequence in sequences], dtype=torch.float64),
    )


def _uniform(sequence: Sequence, ahead: int) -> float:
    """In [0, 1), from a counter-based generator: no state, so batches and preemption cannot change it."""
    if sequence.request.sampling.greedy:
        return 0.0
    key = np.array([sequence.request.seed % 2**64, sequence.index], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=len(sequence.output) + ahead)).random())
