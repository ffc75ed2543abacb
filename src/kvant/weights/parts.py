"""Which stored projections a layer's fused matrices are made of, and in what order their rows are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvant.models.families import Names
from kvant.models.spec import ModelSpec


@dataclass(frozen=True)
class Part:
    """A stored projection [rows, columns].

    Attributes:
        name: of its tensors, without the layer's prefix and ".weight".
        order: the stored rows to take, in order, to have ours; None where they are stored so.
    """

    name: str
    rows: int
    order: Tensor | None = None


@dataclass(frozen=True)
class FusedLinear:
    """The projections, one below the other, that are one matrix of ours with so many columns."""

    parts: tuple[Part, ...]
    columns: int


def fused_linears(spec: ModelSpec, names: Names) -> Mapping[str, FusedLinear]:
    """The matrices of a decoder layer: "qkv", "out", "gate_up" and "down", as `LayerWeights` has them."""
    query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    width, hidden = spec.intermediate_size, spec.hidden_size
    return {
        "qkv": FusedLinear(_parts(names.qkv, (query, kv, kv), _row_orders(spec, names)), hidden),
        "out": FusedLinear(_parts((names.out,), (hidden,)), query),
        "gate_up": FusedLinear(_parts(names.gate_up, (width, width)), hidden),
        "down": FusedLinear(_parts((names.down,), (hidden,)), width),
    }


def _parts(
    names: tuple[str, ...], rows: tuple[int, ...], orders: Mapping[int, Tensor] | None = None
) -> tuple[Part, ...]:
    """Projections of so many rows each; a single name holds all of them."""
    sizes = rows if len(names) == len(rows) else (sum(rows),)
    found = orders or {}
    return tuple(Part(name, size, found.get(i)) for i, (name, size) in enumerate(zip(names, sizes, strict=True)))


def _row_orders(spec: ModelSpec, names: Names) -> dict[int, Tensor]:
    """For each part of qkv whose rows are not stored in our order, the rows to take, in order."""
    if names.row_order == "grouped":
        return {0: _ungroup(spec)}
    if names.row_order == "interleaved":
        return {0: _deinterleave(spec.num_heads, spec.head_dim), 1: _deinterleave(spec.num_kv_heads, spec.head_dim)}
    return {}


def _ungroup(spec: ModelSpec) -> Tensor:
    """Rows of [q heads of a KV group, its k, its v] per group -> all q, all k, all v."""
    per_group = spec.num_heads // spec.num_kv_heads
    rows = torch.arange(spec.num_kv_heads * (per_group + 2) * spec.head_dim)
    q, k, v = rows.view(spec.num_kv_heads, per_group + 2, spec.head_dim).split([per_group, 1, 1], dim=1)
    return torch.cat([q.flatten(), k.flatten(), v.flatten()])


def _deinterleave(heads: int, head_dim: int) -> Tensor:
    """Rotary pairs stored as neighbours (2i, 2i + 1) -> as halves (i, i + D / 2)."""
    return torch.arange(heads * head_dim).view(heads, head_dim // 2, 2).transpose(1, 2).flatten()
