"""Prepared weights as named tensors and a few facts, and back; a layer's weights by name, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvant.errors import CorruptModelError
from kvant.formats.weight import InputCodes, PackedWeight, WeightPlane
from kvant.kernels.cpu.weights import NativeWeight, native_weight
from kvant.models.layers import AttentionWeights, LayerWeights, Linear, MlpWeights

LINEARS = ("qkv", "out", "gate_up", "down")
_ATTENTION_NORMS = ("q_norm", "k_norm")
_LAYER_NORMS = ("input_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm")
Piece = NativeWeight | PackedWeight | Tensor


@dataclass(frozen=True)
class Stored:
    """A matrix or vector as it lies in a file.

    Attributes:
        facts: plain data that tells, with the tensors, all of it; empty for a vector.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)


def to_stored(piece: Piece) -> Stored:
    """Its tensors are the piece's own, not copied."""
    match piece:
        case NativeWeight(struct=struct, memory=memory):
            rows, columns = piece.shape
            return Stored(memory, {"kind": piece.kind, "rows": rows, "columns": columns, "group": struct.group})
        case PackedWeight():
            return _stored_planes(piece)
        case _:
            return Stored({"data": piece})


def from_stored(stored: Stored) -> Piece:
    """The piece, with the tensors as its memory.

    Raises:
        CorruptModelError: facts and tensors do not fit together.
    """
    facts, tensors = stored.facts, stored.tensors
    try:
        if "kind" in facts:
            return native_weight(facts["kind"], facts["rows"], facts["columns"], facts["group"], tensors)
        return _planes(facts, tensors) if "format" in facts else tensors["data"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptModelError(f"a weight is not described as kvant does it: {error!r}") from error


def _stored_planes(weight: PackedWeight) -> Stored:
    tensors = {name: plane.data for name, plane in weight.planes.items()}
    facts: dict[str, Any] = {
        "format": weight.format,
        "columns": weight.in_features,
        "spans": {name: plane.span for name, plane in weight.planes.items()},
        "rounded_inputs": weight.inputs is not None,
    }
    if weight.order is not None:
        tensors["order"] = weight.order
    if weight.inputs is not None and weight.inputs.scale is not None:
        tensors["input_scale"] = weight.inputs.scale
    return Stored(tensors, facts)


def _planes(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PackedWeight:
    planes = {name: WeightPlane(tensors[name], span) for name, span in facts["spans"].items()}
    rows, columns = next(iter(planes.values())).data.shape[0], facts["columns"]
    for name, plane in planes.items():
        if plane.data.shape != (rows, -(-columns // plane.span)):
            raise CorruptModelError(
                f"the plane {name!r} of a weight of {rows} x {columns} is {tuple(plane.data.shape)}"
            )
    inputs = InputCodes(tensors.get("input_scale")) if facts["rounded_inputs"] else None
    return PackedWeight(facts["format"], columns, planes, tensors.get("order"), inputs)


def linear_pieces(name: str, linear: Linear) -> dict[str, Piece]:
    """A linear by names that begin with its own."""
    bias = {} if linear.bias is None else {f"{name}.bias": linear.bias}
    return {name: linear.weight, **bias}


def linear_of(name: str, pieces: Mapping[str, Any]) -> Linear:
    """What `linear_pieces` took apart."""
    return Linear(pieces[name], pieces.get(f"{name}.bias"))


def layer_pieces(layer: LayerWeights) -> dict[str, Piece]:
    """A layer's matrices and vectors by name; those that it does not have are left out."""
    linears = (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down)
    pieces = {
        name: p for key, linear in zip(LINEARS, linears, strict=True) for name, p in linear_pieces(key, linear).items()
    }
    norms = {name: getattr(layer.attention, name) for name in _ATTENTION_NORMS}
    norms |= {name: getattr(layer, name) for name in _LAYER_NORMS}
    return {**pieces, **{name: norm for name, norm in norms.items() if norm is not None}}


def layer_of(pieces: Mapping[str, Any]) -> LayerWeights:
    """What `layer_pieces` took apart."""
    qkv, out, gate_up, down = (linear_of(name, pieces) for name in LINEARS)
    return LayerWeights(
        attention=AttentionWeights(qkv, out, *(pieces.get(name) for name in _ATTENTION_NORMS)),
        mlp=MlpWeights(gate_up, down),
        input_norm=pieces["input_norm"],
        mlp_norm=pieces["mlp_norm"],
        post_attention_norm=pieces.get("post_attention_norm"),
        post_mlp_norm=pieces.get("post_mlp_norm"),
    )


def shape_of(piece: Piece) -> tuple[int, ...]:
    """[out_features, in_features] of a matrix, [N] of a vector."""
    return (piece.out_features, piece.in_features) if isinstance(piece, PackedWeight) else tuple(piece.shape)
