"""From logits to tokens: what a request asks of its distribution, then the backend's `sample`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as List

import numpy as np
import torch
from torch import Tensor

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
        reshaped = [row for row, sequence in enumerate(sequences) if sequence.reshapes]
        if reshaped:
            logits = logits.clone()
        for row in reshaped:
            _reshape(logits[row], sequences[row])
        return self._ops.sample(logits, sampling_batch(sequences, ahead))


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


def sampling_batch(sequences: List[Sequence], ahead: int = 0, steps: int = 1) -> SamplingBatch:
    """What the sequences ask of their next token's distribution once it is reshaped.

    Args:
        sequences: one a row.
        ahead: as in `Sampler.draw`.
        steps: of a burst.
    """
    temperature, top_k, top_p, min_p = zip(*[sequence.request.sampling.filters for sequence in sequences], strict=True)
    uniform = [
        0.0 if sequence.request.sampling.temperature == 0 else sequence.randomness.at(len(sequence.output) + step)
        for step in range(ahead, ahead + steps)
        for sequence in sequences
    ]
    return SamplingBatch(
        temperature=torch.from_numpy(np.array(temperature, dtype=np.float32)),
        top_k=torch.from_numpy(np.array(top_k, dtype=np.int64)),
        top_p=torch.from_numpy(np.array(top_p, dtype=np.float32)),
        min_p=torch.from_numpy(np.array(min_p, dtype=np.float32)),
        uniform=torch.from_numpy(np.array(uniform)),
    )
