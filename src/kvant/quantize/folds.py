"""Where the inputs of a linear layer can be divided by a factor each, for nothing: by changing what makes them.

AWQ and SmoothQuant multiply a weight's columns and divide its inputs. That costs nothing where a norm's weight, or rows
of an earlier linear layer, can be divided instead. Which of them feeds which is not listed anywhere: every one that
could by its size is tried on a layer's own weights, and those that leave what the layer computes as it was are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvant.formats.weight import PackedWeight
from kvant.models.layers import LayerWeights, Linear
from kvant.models.spec import ModelSpec

_NORMS = ("input_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm")
_SMALLEST, _LARGEST = 2.0**-14, 2.0**15  # of a scale in float16, to be normal
_TOLERANCE = 1e-3  # of what the layer adds; float32 leaves a hundredth of that


@dataclass(frozen=True)
class Fold:
    """What makes the inputs of a linear layer.

    Attributes:
        producer: a norm of the layer, or one of its linears.
        channels: [K] int64, the element of the norm, or the row of the linear, that makes each input.
        stored: a norm's dtype and offset as it is stored, see `ModelSpec.norm_offset`; None for rows.
    """

    producer: str
    channels: Tensor
    stored: tuple[torch.dtype, float] | None = None

    @property
    def ties(self) -> Tensor | None:
        """[K] int64, equal for inputs that must have the same factor; None where all may differ."""
        return None if len(self.channels.unique()) == len(self.channels) else self.channels - self.channels.min()

    def settled(self, layer: LayerWeights, scale: Tensor) -> Tensor:
        """The factors nearest to these, [K], that can be stored."""
        if self.stored is None:
            return self._of_rows(layer, scale)
        norm = getattr(layer, self.producer)
        divided = self._stored_norm(norm, scale)
        possible = (divided / norm > 0) & divided.isfinite()
        return torch.where(possible, norm / divided, 1.0)

    def applied(self, layer: LayerWeights, scale: Tensor) -> LayerWeights:
        """The layer with what makes the inputs divided by the factors, which are settled."""
        if self.stored is not None:
            norm = getattr(layer, self.producer)
            divided = torch.where(scale == 1, norm, self._stored_norm(norm, scale))
            norms: dict[str, Any] = {self.producer: divided}
            return replace(layer, **norms)
        linear = layer.linears[self.producer]
        factors = torch.ones(linear.weight.out_features)
        factors[self.channels] = 1 / scale
        bias = None if linear.bias is None else linear.bias * factors
        return layer.with_linears(**{self.producer: Linear(linear.weight.times(factors), bias)})

    def _of_rows(self, layer: LayerWeights, scale: Tensor) -> Tensor:
        """Factors that leave the scales of the rows within float16's normal numbers.

        Where a row has one scale, the factor is what rounding makes of it, and nothing is lost; of several, each is
        rounded its own way, which is a thousandth of what the codes lose.
        """
        planes = layer.linears[self.producer].weight.planes
        stored = (planes["scale"] if "scale" in planes else planes["weight"]).data[self.channels]
        data = stored.float().abs()
        low = data.amax(1) / _LARGEST
        high = torch.where(data > 0, data, torch.inf).amin(1) / _SMALLEST
        chosen = torch.where(low <= high, torch.minimum(torch.maximum(scale, low), high), 1.0)
        if data.shape[1] > 1:
            return chosen
        divided = (data[:, 0] / chosen).to(stored.dtype).float()
        return torch.where(divided > 0, data[:, 0] / divided, chosen)

    def _stored_norm(self, norm: Tensor, scale: Tensor) -> Tensor:
        assert self.stored is not None
        dtype, offset = self.stored
        return (norm / scale - offset).to(dtype).float() + offset


def find_folds(
    layer: LayerWeights, spec: ModelSpec, norm_dtype: torch.dtype, run: Callable[[LayerWeights], Tensor]
) -> dict[str, Fold]:
    """What makes the inputs of each linear of a layer, where that can be divided.

    Args:
        layer: with dense weights that are not prepared.
        spec: the model's.
        norm_dtype: that norms are stored in.
        run: what the layer adds to some hidden states, [tokens, hidden] float32.
    """
    plain, found = run(layer), {}
    generator = torch.Generator().manual_seed(0)
    for kind, linear in layer.linears.items():
        scale = torch.rand(linear.weight.in_features, generator=generator) * 1.5 + 0.5
        for fold in _candidates(layer, kind, spec):
            if _holds(fold, layer, kind, scale, plain, run):
                exact = fold.stored is None
                found[kind] = fold if exact else replace(fold, stored=(norm_dtype, spec.norm_offset))
                break
    return found


def _candidates(layer: LayerWeights, kind: str, spec: ModelSpec) -> Iterator[Fold]:
    """Norms of as many elements as there are inputs; the last rows of earlier linears, one each or one a query head."""
    inputs = torch.arange(layer.linears[kind].weight.in_features)
    for name in _NORMS:
        norm = getattr(layer, name)
        if norm is not None and len(norm) == len(inputs):
            yield Fold(name, inputs, (torch.float32, 0.0))
    repeat, dim = spec.num_heads // spec.num_kv_heads, spec.head_dim
    of_kv_head = inputs // (dim * repeat) * dim + inputs % dim
    for producer, linear in layer.linears.items():
        if producer == kind:
            return
        for rows in (inputs, of_kv_head):
            first = linear.weight.out_features - 1 - int(rows.max())
            if first >= 0:
                yield Fold(producer, rows + first)


def _holds(
    fold: Fold, layer: LayerWeights, kind: str, scale: Tensor, plain: Tensor, run: Callable[[LayerWeights], Tensor]
) -> bool:
    """Whether dividing there and multiplying here cancel, and each alone does not."""
    if fold.ties is not None:
        scale = scale[fold.ties]
    divided = fold.applied(layer, scale)
    linear = divided.linears[kind]
    weight = PackedWeight.dense(linear.weight.dequantize(torch.float32) * scale)
    both = divided.with_linears(**{kind: Linear(weight, linear.bias)})
    return _alike(run(both), plain) and not _alike(run(divided), plain)


def _alike(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= _TOLERANCE * expected.norm())
