"""What a change of one layer does to a model, seen one layer later.

How large an error is where it arises says little of what it does. Where outliers of a weight are clipped, the errors
get smaller, and yet those of some layers do twice the harm: they point the same way for all tokens, and it is the
attention of the next layer that minds. Once that has run, errors rank as they do in the model's results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor

from kvant.errors import NotFiniteError
from kvant.models.layers import LayerWeights
from kvant.quantize.chunked import ChunkedOps, fast_dtype
from kvant.quantize.reader import Reader, prepared, proceed

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trial:
    """A layer, the one after it, and some texts; what results are compared with is computed when it is first needed.

    Attributes:
        reader: that runs both.
        index: of the layer.
        layer: its weights, dense and not prepared.
        following: the next one's, the same; None after the last.
        hidden: what the texts are before it, [tokens, hidden].
    """

    reader: Reader
    index: int
    layer: LayerWeights
    following: LayerWeights | None
    hidden: Tensor

    def harm(self, products: Mapping[str, Product]) -> float:
        """What share of what a token is its change is, in squares, the mean of all tokens; infinite if there is none.

        That is what it is for the next layer's MLP; after the last layer, when that ends. A token counts by its share,
        since a norm follows, and since the first ones are thousands of times as large.

        Args:
            products: how some of the layer's linears are computed, by name; the others are as they were.
        """
        energy = self._expected.square().sum(1).clamp(min=1e-30)
        try:
            change = (self._outcome(products) - self._expected).square().sum(1)
        except NotFiniteError:
            return math.inf
        share = float((change / energy).mean())
        return share if math.isfinite(share) else math.inf

    @cached_property
    def _prepared(self) -> tuple[LayerWeights, ...]:
        ops = ChunkedOps(fast_dtype())
        return tuple(prepared(layer, ops) for layer in (self.layer, self.following) if layer is not None)

    @cached_property
    def _expected(self) -> Tensor:
        return self._outcome({})

    def _outcome(self, products: Mapping[str, Product]) -> Tensor:
        reader, (changed, *following) = self.reader, self._prepared
        running = reader.products(self.index, changed, self.hidden)
        x = proceed(running, None)
        for kind, linear in changed.linears.items():
            x = proceed(running, products.get(kind, partial(linear, reader.ops))(x))
        for layer in following:
            running = reader.products(self.index + 1, layer, x)
            x = proceed(running, None)
            for linear in (layer.attention.qkv, layer.attention.out):
                x = proceed(running, linear(reader.ops, x))
        return x.float()
