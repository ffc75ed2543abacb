"""What a change of one layer does to a model, seen one layer later.

How large an error is where it arises says little of what it does. Where outliers of a weight are clipped, the errors
get smaller, and yet those of some layers do twice the harm: they point the same way for all tokens, and it is the
attention of the next layer that minds. Once that has run, errors rank as they do in the model's results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from kvant.models.layers import LayerWeights
from kvant.quantize.chunked import ChunkedOps, fast_dtype
from kvant.quantize.reader import Reader, prepared, proceed

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """A layer, the one after it, and some texts.

    Attributes:
        reader: that runs both.
        index: of the layer.
        layers: it, and the one after it if there is one, with prepared weights.
        hidden: what the texts are before it, [tokens, hidden].
        expected: what they are for the next layer's MLP, [tokens, hidden] float32; after the last layer, when it ends.
    """

    reader: Reader
    index: int
    layers: tuple[LayerWeights, ...]
    hidden: Tensor
    expected: Tensor

    @classmethod
    def of(
        cls, reader: Reader, index: int, layer: LayerWeights, following: LayerWeights | None, hidden: Tensor
    ) -> Trial:
        """Of layers as they are read: dense, not prepared."""
        ops = ChunkedOps(fast_dtype())
        layers = tuple(prepared(it, ops) for it in (layer, following) if it is not None)
        return cls(reader, index, layers, hidden, _outcome(reader, index, layers, hidden, {}))

    def harm(self, products: Mapping[str, Product]) -> float:
        """What share of what a token is its change is, in squares, the mean of all tokens.

        A token counts by its share, since a norm follows, and since the first ones are thousands of times as large.

        Args:
            products: how some of the layer's linears are computed, by name; the others are as they were.
        """
        changed = _outcome(self.reader, self.index, self.layers, self.hidden, products)
        energy = self.expected.square().sum(1).clamp(min=1e-30)
        return float(((changed - self.expected).square().sum(1) / energy).mean())


def _outcome(
    reader: Reader, index: int, layers: tuple[LayerWeights, ...], hidden: Tensor, products: Mapping[str, Product]
) -> Tensor:
    changed, *following = layers
    running = reader.products(index, changed, hidden)
    x = proceed(running, None)
    for kind, linear in changed.linears.items():
        x = proceed(running, products.get(kind, partial(linear, reader.ops))(x))
    for layer in following:
        running = reader.products(index + 1, layer, x)
        x = proceed(running, None)
        for linear in (layer.attention.qkv, layer.attention.out):
            x = proceed(running, linear(reader.ops, x))
    return x.float()
