"""Lengths of requests like those of chats, made up: no data set is needed."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

# Means as published for ShareGPT with the OPT tokenizer (Kwon et al. 2023, PagedAttention): 161 and 338 tokens.
PROMPT_MEAN, OUTPUT_MEAN = 161.0, 338.0
_PROMPT_SPREAD, _OUTPUT_SPREAD = 1.2, 0.9  # of the logarithms: most prompts are short, few are very long
_LONGEST = 1024


@dataclass(frozen=True)
class Lengths:
    """Tokens of one request."""

    prompt: int
    output: int


def chat_lengths(count: int, seed: int = 0, shrink: float = 1.0) -> list[Lengths]:
    """Lognormal lengths with the published means, each from 4 tokens to 1024; the cuts move the means by a few percent.

    Args:
        count: of requests.
        seed: the same seed gives the same lengths.
        shrink: divides all lengths.
    """
    source = random.Random(seed)

    def draw(mean: float, spread: float) -> int:
        length = source.lognormvariate(math.log(mean) - spread * spread / 2, spread)
        return max(int(min(max(length, 4), _LONGEST) / shrink), 1)

    return [Lengths(draw(PROMPT_MEAN, _PROMPT_SPREAD), draw(OUTPUT_MEAN, _OUTPUT_SPREAD)) for _ in range(count)]
