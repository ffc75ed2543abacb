"""What a linear layer's inputs are like over a text: the sums that a quantization's errors are weighed with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvant.errors import NotFiniteError

_TOKENS_AT_ONCE = 4096  # converted to float32 together
_COLUMNS_AT_ONCE = 512  # of the product: little of what lies below its diagonal is computed
_KEPT = 1024


@dataclass(frozen=True)
class Moments:
    """Statistics of the inputs x [K] of a linear layer.

    Attributes:
        second: [K, K] float32, the mean of x x^T.
        magnitude: [K] float32, the mean of |x|.
        largest: [K] float32, the largest |x|.
        sample: [tokens, K] float32, some of the inputs themselves.
        count: how many tokens the means are over.
    """

    second: Tensor
    magnitude: Tensor
    largest: Tensor
    sample: Tensor
    count: int

    @classmethod
    def of(cls, texts: Sequence[Tensor]) -> Moments:
        """Of inputs [tokens, K], any float dtype. Beside the result, memory for some thousand rows is taken.

        Raises:
            NotFiniteError: some are not finite.
        """
        width, count = texts[0].shape[1], sum(map(len, texts))
        second, magnitude, largest = torch.zeros(width, width), torch.zeros(width), torch.zeros(width)
        for rows in (rows for text in texts for rows in text.split(_TOKENS_AT_ONCE)):
            wide = rows.float()
            size = wide.abs()
            magnitude += size.sum(0)
            torch.maximum(largest, size.amax(0), out=largest)
            for first in range(0, width, _COLUMNS_AT_ONCE):
                stop = min(first + _COLUMNS_AT_ONCE, width)
                second[first:stop, first:].addmm_(wide[:, first:stop].T, wide[:, first:])
        if not (magnitude.isfinite().all() and second.isfinite().all()):
            raise NotFiniteError("a linear layer's inputs are not finite on the calibration text")
        second = second.triu_().div_(count)
        second += second.triu(1).T
        return cls(second, magnitude / count, largest, _sample(texts, count), count)

    @property
    def importance(self) -> Tensor:
        """[K], the mean of x^2: how much a column's rounding errors count."""
        return self.second.diagonal()

    def divided(self, scale: Tensor) -> Moments:
        """Of the inputs divided by a positive factor each, [K]."""
        second = self.second / scale.unsqueeze(1) / scale
        return Moments(second, self.magnitude / scale, self.largest / scale, self.sample / scale, self.count)

    def without(self, part: Moments) -> Moments:
        """Of the inputs that are not those of a part; what is largest, and the sample, stay as they are."""
        count = self.count - part.count
        rest, less = self.count / count, part.count / count
        second = (self.second * rest).sub_(part.second, alpha=less)
        second.diagonal().clamp_(min=0)
        magnitude = (self.magnitude * rest - part.magnitude * less).clamp_(min=0)
        return replace(self, second=second, magnitude=magnitude, count=count)

    def loss(self, error: Tensor) -> float:
        """The mean squared error of the outputs, summed over them, that errors [N, K] of the weight make."""
        return float(((error @ self.second) * error).sum(dtype=torch.float64))


def _sample(texts: Sequence[Tensor], count: int) -> Tensor:
    """Some rows of each text. Drawn, since a step could meet the same position of all, and first tokens are odd."""
    share, generator = min(1.0, _KEPT / count), torch.Generator().manual_seed(0)
    rows = (torch.randperm(len(text), generator=generator)[: max(1, round(len(text) * share))] for text in texts)
    return torch.cat([text[some] for text, some in zip(texts, rows, strict=True)]).float()
