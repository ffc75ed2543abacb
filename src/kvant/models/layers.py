"""The decoder's parts: their weights, and how they are applied.

A layer is a coroutine: it asks for each product of a linear layer, and whoever runs it gives the answer. The engine
computes them one after the other (`computed`); quantizing stops there, to look at the inputs of many texts first.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.kernels.ops import AttentionBatch, AttentionShape, Ops
from kvant.models.spec import LayerSpec, ModelSpec


@dataclass(frozen=True)
class Linear:
    """A prepared weight and its bias ([N], compute dtype)."""

    weight: Any
    bias: Tensor | None = None

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class AttentionWeights:
    """qkv: rows of all query heads, then key heads, then value heads. The head norms are [head_dim] float32."""

    qkv: Linear
    out: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class MlpWeights:
    """gate_up: rows of the gate, then of the up projection."""

    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; norms are [hidden] float32, the post norms exist only where the spec has post_norms."""

    input_norm: Tensor
    attention: AttentionWeights
    mlp_norm: Tensor
    mlp: MlpWeights
    post_attention_norm: Tensor | None = None
    post_mlp_norm: Tensor | None = None

    @property
    def linears(self) -> dict[str, Linear]:
        """The layer's matrices by name, in the order in which they are applied."""
        return {
            "qkv": self.attention.qkv,
            "out": self.attention.out,
            "gate_up": self.mlp.gate_up,
            "down": self.mlp.down,
        }

    def with_linears(self, **changed: Linear) -> LayerWeights:
        """The same layer with some of them replaced."""
        linears = self.linears | changed
        return replace(
            self,
            attention=replace(self.attention, qkv=linears["qkv"], out=linears["out"]),
            mlp=MlpWeights(linears["gate_up"], linears["down"]),
        )


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a model, prepared for one backend. `embedding` is what `ops.embedding` takes."""

    embedding: Any
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Linear


T = TypeVar("T")
# Asks for `linear`'s product with x, is sent it, and returns a T at last.
Products = Generator[tuple[Linear, Tensor], Tensor, T]


@dataclass(frozen=True)
class TokenContext:
    """What one layer's attention needs to know of the step's tokens."""

    batch: AttentionBatch
    rotary: tuple[Tensor, Tensor] | None
    query_scale: Tensor | None = None  # [T, 1, 1]: log-n attention
    rows: Tensor | None = None  # [R] int64, those that go on from the layer's attention; None: all

    def going_on(self, x: Tensor) -> Tensor:
        """The rows of x [T, ...] that go on from the layer's attention."""
        return x if self.rows is None else x[self.rows]


def decoder_layer(
    ops: Ops,
    x: Tensor,
    residual: Tensor,
    weights: LayerWeights,
    spec: ModelSpec,
    shape: AttentionShape,
    cache: KVLayer,
    tokens: TokenContext,
) -> Products[tuple[Tensor, Tensor]]:
    """One layer of the decoder: x [T, hidden], what the one before adds to its residual -> the same of this layer.

    Keys and values are of all tokens; what is returned is of those that go on from its attention.
    """
    qkv, out, gate_up, down = weights.linears.values()
    h, residual = ops.add_rms_norm(x, residual, weights.input_norm, spec.rms_eps, qkv.weight)
    # Many layers may wait for a product at once: there, nothing but the residual has a name that keeps it in memory.
    asked = [h]
    del x, h
    x = yield out, attention(ops, (yield qkv, asked.pop()), weights.attention, shape, spec.rms_eps, cache, tokens)
    residual = tokens.going_on(residual)
    x = _post_norm(ops, x, weights.post_attention_norm, spec.rms_eps)
    h, residual = ops.add_rms_norm(x, residual, weights.mlp_norm, spec.rms_eps, gate_up.weight)
    asked.append(h)
    del x, h
    x = yield down, ops.gated((yield gate_up, asked.pop()), spec.activation)
    return _post_norm(ops, x, weights.post_mlp_norm, spec.rms_eps), residual


def _post_norm(ops: Ops, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else ops.rms_norm(x, weight, eps)


def attention(
    ops: Ops,
    qkv: Tensor,
    weights: AttentionWeights,
    shape: AttentionShape,
    eps: float,
    cache: KVLayer,
    tokens: TokenContext,
) -> Tensor:
    """Norm the heads, rotate and write, attend: projected [T, (H + 2 G) D] -> [R, H D] of the tokens that go on."""
    heads, groups, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    q, k, v = qkv.unflatten(-1, (heads + 2 * groups, dim)).split([heads, groups, groups], dim=1)
    if weights.q_norm is not None and weights.k_norm is not None:
        q, k = ops.rms_norm(q, weights.q_norm, eps), ops.rms_norm(k, weights.k_norm, eps)
    q = ops.rope_write_kv(q, k, v, tokens.rotary, cache, tokens.batch)
    if tokens.query_scale is not None:
        q = q * tokens.query_scale.to(q.dtype)
    return tokens.going_on(ops.attention(q, cache, tokens.batch, shape).flatten(1))


def computed(ops: Ops, products: Products[T]) -> T:
    """What comes of it when each product is computed as it is asked for."""
    try:
        linear, x = next(products)
        while True:
            linear, x = products.send(linear(ops, x))
    except StopIteration as end:
        result: T = end.value
        return result


def attention_shape(spec: ModelSpec, layer: LayerSpec) -> AttentionShape:
    """A layer's attention as the ops take it."""
    return AttentionShape(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        scale=spec.attention_scale,
        window=layer.window,
        softcap=spec.attention_softcap,
    )


def log_n_scale(positions: Tensor, length: int) -> Tensor:
    """Qwen's log-n attention: log(p + 1) / log(length) from position `length` on, 1 before: [T, 1, 1] float32."""
    scale = (positions + 1).double().log() / torch.tensor(float(length), device="cpu").log().item()
    return scale.clamp(min=1.0).float().view(-1, 1, 1)
