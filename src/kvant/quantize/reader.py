"""Running single layers of a model over many texts at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvant.cache.store import KVStore
from kvant.formats.kv import KVPlan, resolve_kv_format
from kvant.kernels.ops import AttentionBatch, Ops
from kvant.models.layers import (
    LayerWeights,
    Linear,
    Products,
    TokenContext,
    attention_shape,
    computed,
    decoder_layer,
    log_n_scale,
)
from kvant.models.rope import RotaryEmbedding
from kvant.models.spec import LayerSpec, ModelSpec, RopeSpec

_BLOCK_SIZE = 64


@dataclass(frozen=True)
class Reader:
    """Runs layers over texts of one length, some of them at once.

    The keys and values of one layer are kept at a time, in float32: attention that was asked for must have been
    computed before other texts, or another layer, come.

    Attributes:
        length: of a text, in tokens.
        batch: where each token of so many texts as fit stands; fewer are read with the first part of it.
        rotary: cosines and sines for each kind of rotary embedding.
        query_scale: of log-n attention.
    """

    spec: ModelSpec
    ops: Ops
    length: int
    store: KVStore
    batch: AttentionBatch
    rotary: dict[RopeSpec, tuple[Tensor, Tensor]]
    query_scale: Tensor | None

    @classmethod
    def of(cls, spec: ModelSpec, ops: Ops, texts: int, length: int) -> Reader:
        """For up to so many texts of so many tokens."""
        blocks = -(-length // _BLOCK_SIZE)
        plan = KVPlan.uniform(resolve_kv_format("fp32", torch.float32), 1)
        store = KVStore.allocate(replace(spec.kv_shape, num_layers=1), plan, texts * blocks, _BLOCK_SIZE)
        positions = torch.arange(length).repeat(texts)
        batch = AttentionBatch(
            positions=positions,
            slots=positions + torch.arange(texts).repeat_interleave(length) * blocks * _BLOCK_SIZE,
            query_starts=tuple(range(0, (texts + 1) * length, length)),
            context_lens=(length,) * texts,
            block_tables=torch.arange(texts * blocks).view(texts, blocks),
        )
        ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
        rotary = {rope: RotaryEmbedding(rope)(positions, torch.full_like(positions, length)) for rope in ropes}
        query_scale = None if spec.log_n_length is None else log_n_scale(positions, spec.log_n_length)
        return cls(spec, ops, length, store, batch, rotary, query_scale)

    def products(self, index: int, weights: LayerWeights, hidden: Tensor) -> Products[tuple[Tensor, Tensor]]:
        """A layer's coroutine over what the one before left, [tokens, hidden]; it returns two parts of what follows."""
        layer = self.spec.layers[index]
        tokens = self._context(layer, len(hidden))
        nothing = hidden.new_zeros(()).expand_as(hidden)
        shape = attention_shape(self.spec, layer)
        return decoder_layer(self.ops, nothing, hidden, weights, self.spec, shape, self.store.layers[0], tokens)

    def layer(self, index: int, weights: LayerWeights, hidden: Tensor) -> Tensor:
        """What a layer makes of [tokens, hidden]."""
        x, residual = computed(self.ops, self.products(index, weights, hidden))
        return x + residual

    def _context(self, layer: LayerSpec, count: int) -> TokenContext:
        batch, texts = self.batch, count // self.length
        some = AttentionBatch(
            positions=batch.positions[:count],
            slots=batch.slots[:count],
            query_starts=batch.query_starts[: texts + 1],
            context_lens=batch.context_lens[:texts],
            block_tables=batch.block_tables[:texts],
        )
        rotary = None if layer.rope is None else self.rotary[layer.rope]
        turns = None if rotary is None else (rotary[0][:count], rotary[1][:count])
        return TokenContext(some, turns, None if self.query_scale is None else self.query_scale[:count])


def proceed(products: Products[tuple[Tensor, Tensor]], product: Tensor | None) -> Tensor:
    """Run a layer on with what it asked for: to the inputs of the next product, or to the hidden states at its end."""
    try:
        # Many wait here at once, in 16 bit.
        return (next(products) if product is None else products.send(product))[1].bfloat16()
    except StopIteration as end:
        x, residual = end.value
        hidden: Tensor = x + residual
        return hidden


def prepared(layer: LayerWeights, ops: Ops) -> LayerWeights:
    """A layer whose linears are as these ops take them."""
    return layer.with_linears(
        **{kind: Linear(ops.prepare(linear.weight), linear.bias) for kind, linear in layer.linears.items()}
    )
