"""A quantized decoder layer as the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvant.errors import UnsupportedModelError
from kvant.formats.weight import PackedWeight
from kvant.models.families import Names
from kvant.models.layers import LayerWeights, Linear
from kvant.models.spec import ModelSpec
from kvant.weights.codecs.writing import Writer
from kvant.weights.parts import FusedLinear, Part, fused_linears


@dataclass(frozen=True)
class StoredModel:
    """How a model's layers are stored.

    Attributes:
        spec: of the model as an HF checkpoint has it.
        names: that such a checkpoint has for its tensors.
        writer: of the quantized modules.
        dtype: of everything else.
    """

    spec: ModelSpec
    names: Names
    writer: Writer
    dtype: torch.dtype

    def modules(self, index: int, kind: str) -> list[str]:
        """The names of the projections that one of a layer's linears is made of."""
        return [self._prefix(index) + part.name for part in self._fused[kind].parts]

    def layer(self, index: int, layer: LayerWeights) -> dict[str, Tensor]:
        """All tensors of a layer whose linears are packed or dense.

        Raises:
            UnsupportedModelError: a weight has no place in the format.
        """
        found = self._norms(index, layer)
        for kind, linear in layer.linears.items():
            for name, weight, bias in self._projections(index, self._fused[kind], linear):
                found |= self._matrix(name, weight)
                if bias is not None:
                    found[f"{name}.bias"] = self.dense(f"{name}.bias", bias)
        return found

    def norm(self, name: str, norm: Tensor) -> Tensor:
        """A norm's weight as it is stored."""
        return self.dense(name, norm - self.spec.norm_offset)

    def dense(self, name: str, values: Tensor) -> Tensor:
        """Values in the dtype of the checkpoint.

        Raises:
            UnsupportedModelError: some are beyond it.
        """
        stored = values.to(self.dtype)
        if not stored.isfinite().all():
            raise UnsupportedModelError(
                f"{name} has values that are not finite in {self.dtype}, which the format asks for; choose the format "
                "compressed-tensors, or mend the model"
            )
        return stored.contiguous()

    @property
    def _fused(self) -> Mapping[str, FusedLinear]:
        return fused_linears(self.spec, self.names)

    def _prefix(self, index: int) -> str:
        return self.names.layer.format(index)

    def _matrix(self, name: str, weight: PackedWeight) -> dict[str, Tensor]:
        if weight.format != "dense":
            return self.writer.encode(name, weight)
        return {f"{name}.weight": self.dense(f"{name}.weight", weight.planes["weight"].data)}

    def _norms(self, index: int, layer: LayerWeights) -> dict[str, Tensor]:
        names, attention = self.names, layer.attention
        norms = {
            names.input_norm: layer.input_norm,
            names.mlp_norm: layer.mlp_norm,
            names.q_norm: attention.q_norm,
            names.k_norm: attention.k_norm,
        }
        if self.spec.post_norms:
            norms |= {names.post_attention_norm: layer.post_attention_norm, names.post_mlp_norm: layer.post_mlp_norm}
        found = {f"{self._prefix(index)}{name}.weight": norm for name, norm in norms.items() if norm is not None}
        return {name: self.norm(name, norm) for name, norm in found.items()}

    def _projections(
        self, index: int, fused: FusedLinear, linear: Linear
    ) -> Iterator[tuple[str, PackedWeight, Tensor | None]]:
        """A linear's projections by name, their rows as they are stored."""
        first = 0
        for part in fused.parts:
            rows = _stored_rows(part) + first
            first += part.rows
            bias = None if linear.bias is None else linear.bias[rows]
            yield self._prefix(index) + part.name, linear.weight.rows(rows), bias


def _stored_rows(part: Part) -> Tensor:
    """[rows] int64: which of our rows each stored one is."""
    return torch.arange(part.rows) if part.order is None else part.order.argsort()
