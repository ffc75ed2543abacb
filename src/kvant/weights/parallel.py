"""Which part of each weight a tensor-parallel rank holds: the one place that knows.

Rank r of n has the r-th n-th of the attention heads and of the MLP's units: those rows of qkv and gate_up, and those
columns of out and down, whose results the ranks add up. Norms are on every rank. Where a layer rounds its inputs by
each token's largest, a rank that has a part of the inputs takes the largest of that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvant.errors import ConfigError
from kvant.formats.weight import PackedWeight
from kvant.models.layers import LayerWeights, Linear
from kvant.models.spec import ModelSpec


@dataclass(frozen=True)
class Rank:
    """One of `size` ranks. Its methods take weights whose matrices are `PackedWeight`s, and give this rank's."""

    index: int
    size: int
    spec: ModelSpec

    def __post_init__(self) -> None:
        spec, size = self.spec, self.size
        sizes = {"heads": spec.num_heads, "KV heads": spec.num_kv_heads, "MLP units": spec.intermediate_size}
        for name, count in sizes.items():
            if count % size:
                raise ConfigError(f"tp={size}: the model's {count} {name} do not divide into {size} ranks")

    def vocabulary(self, linear: Linear) -> Linear:
        """Of the embedding or the head: its share of the rows, or all of them where they cannot be shared evenly."""
        rows = self.spec.vocab_size
        return linear if rows % self.size else _rows(linear, self._share(0, rows))

    def layer(self, layer: LayerWeights) -> LayerWeights:
        """Of a decoder layer.

        Raises:
            ConfigError: a share of a matrix's columns ends within a group, or the columns are not stored in order.
        """
        spec, attention, mlp = self.spec, layer.attention, layer.mlp
        query, kv, width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
        heads = torch.cat([self._share(0, query), self._share(query, kv), self._share(query + kv, kv)])
        units = torch.cat([self._share(0, width), self._share(width, width)])
        qkv, out = _rows(attention.qkv, heads), self._columns(attention.out)
        return replace(
            layer,
            attention=replace(attention, qkv=qkv, out=out),
            mlp=replace(mlp, gate_up=_rows(mlp.gate_up, units), down=self._columns(mlp.down)),
        )

    def _share(self, start: int, count: int) -> Tensor:
        size = count // self.size
        return torch.arange(start + self.index * size, start + (self.index + 1) * size)

    def _columns(self, linear: Linear) -> Linear:
        weight: PackedWeight = linear.weight
        if self.size == 1:
            return linear
        size = weight.in_features // self.size
        try:
            part = weight.columns(self.index * size, (self.index + 1) * size)
        except ValueError as error:
            raise ConfigError(f"tp={self.size}: {error}; take fewer ranks, or smaller groups") from error
        # The ranks' results are added up: one of them brings the bias.
        return Linear(part, linear.bias if self.index == 0 else None)


def _rows(linear: Linear, rows: Tensor) -> Linear:
    weight: PackedWeight = linear.weight
    if len(rows) == weight.out_features:
        return linear
    return Linear(weight.rows(rows), None if linear.bias is None else linear.bias[rows])
