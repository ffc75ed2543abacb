"""Log-probabilities of tokens: computed for many rows where the logits are, told of each when they have arrived."""

from __future__ import annotations

from collections.abc import Sequence as List

import torch
from torch import Tensor

from kvant.engine.outputs import TokenLogprobs

_ROWS_AT_ONCE = 64  # bounds the memory


def logprob_rows(logits: Tensor, tokens: Tensor, top: int) -> Tensor:
    """For each row its token's log-probability and rank (1 is the likeliest), then the likeliest ones' and their ids.

    Args:
        logits: [R, vocab].
        tokens: [R] int64.
        top: how many likeliest ones; all of a smaller vocabulary.

    Returns:
        [R, 2 + 2 * top] float64, which holds any id: one tensor, so that one copy brings it to the host.
    """
    pieces = zip(logits.split(_ROWS_AT_ONCE), tokens.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([_rows(piece, drawn, top) for piece, drawn in pieces])


def told(row: List[float], token: int, top: int) -> TokenLogprobs:
    """A row of `logprob_rows` for a token that was drawn, with its `top` likeliest, or all that the row has."""
    logprob, rank, *likeliest = row
    there = len(likeliest) // 2
    ids = map(int, likeliest[there:])
    return TokenLogprobs(token, logprob, int(rank), tuple(zip(ids, likeliest[: min(top, there)], strict=False)))


def _rows(logits: Tensor, tokens: Tensor, top: int) -> Tensor:
    logprobs = logits.log_softmax(-1)
    drawn = logprobs.gather(1, tokens.unsqueeze(1))
    rank = (logprobs > drawn).sum(-1, keepdim=True) + 1
    values, ids = logprobs.topk(min(top, logprobs.shape[-1]))
    return torch.cat([part.double() for part in (drawn, rank, values, ids)], dim=1)
