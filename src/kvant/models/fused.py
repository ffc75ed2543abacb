"""The decoder's step as one call into native kernels, for models and caches that these know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ctypes import POINTER, byref, c_void_p, cast
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvant.formats.kv import KVLayer, check_finite
from kvant.kernels.burst import Burst
from kvant.kernels.cpu import structs
from kvant.kernels.cpu.cache import (
    NativeCache,
    bind_batch,
    bind_burst,
    bind_cache,
    bind_sampling,
    bind_shape,
    is_native,
)
from kvant.kernels.cpu.native import Native, floats, pointer
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.ops import AttentionBatch, AttentionShape, Ops, SamplingBatch
from kvant.models.layers import DecoderWeights, LayerWeights, Linear
from kvant.models.rope import RotaryEmbedding
from kvant.models.spec import ModelSpec, RopeSpec

Embeddings = Mapping[RopeSpec, RotaryEmbedding]


def fuse(
    spec: ModelSpec, weights: DecoderWeights, ops: Ops, shapes: Sequence[AttentionShape], ropes: Embeddings
) -> FusedDecoder | None:
    """The decoder as one call, where the backend has it."""
    return FusedDecoder(spec, weights, ops.native, shapes, ropes) if isinstance(ops, CpuOps) else None


@dataclass(frozen=True, eq=False)
class _NativeRopes:
    """A model's rotary embeddings for the tokens of a step, and the memory that the structures point to."""

    structs: object  # an array of structs.Rope
    memory: tuple[Tensor, ...]


class FusedDecoder:
    """A model's structures, made once; it is stateless but for the structures of the cache that it saw last."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DecoderWeights,
        native: Native,
        shapes: Sequence[AttentionShape],
        ropes: Embeddings,
    ) -> None:
        self._spec = spec
        self._native = native
        self._weights = weights
        self._memory: list[Tensor] = []
        self._ropes = tuple(ropes.values())
        fixed = all(rope.fixed for rope in self._ropes)
        self._fixed_ropes = self._bind_ropes(torch.empty(0, dtype=torch.int64)) if fixed else None
        self._model = self._bind_model(shapes, tuple(ropes))
        self._bound: tuple[Sequence[KVLayer], NativeCache | None] = ((), None)

    def bursts(self, cache: Sequence[KVLayer]) -> bool:
        """Whether the kernels know the cache, and rotations depend on positions alone: one step may follow another."""
        return self._fixed_ropes is not None and self._cache(cache) is not None

    def forward(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        rope_lengths: Tensor,
        query_scale: Tensor | None,
        cache: Sequence[KVLayer],
        rows: Tensor | None,
    ) -> Tensor | None:
        """As `Decoder.forward`, float32; None where the cache has a layer that the kernels do not know.

        Args:
            ids: the decoder's, as all but the scale are.
            batch: see there.
            rope_lengths: see there.
            cache: see there.
            query_scale: [T, 1, 1], what queries are multiplied by, if anything.
            rows: see there.
        """
        native_cache = self._cache(cache)
        if native_cache is None:
            return None
        count, rows = (len(ids), None) if rows is None else (len(rows), rows.contiguous())
        hidden = torch.empty(count, self._spec.hidden_size)
        results = pointer(rows), count, pointer(hidden)
        self._run("forward", ids, batch, rope_lengths, query_scale, native_cache, *results)
        return hidden

    def draw(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        rope_lengths: Tensor,
        query_scale: Tensor | None,
        cache: Sequence[KVLayer],
        wishes: SamplingBatch,
        burst: Burst,
    ) -> Tensor | None:
        """As `Decoder.draw`; see `forward`."""
        native_cache = self._cache(cache)
        if native_cache is None:
            return None
        how, end = bind_sampling(wishes), bind_burst(burst)
        tokens = torch.from_numpy(np.empty((burst.steps, batch.query_starts[-1]), dtype=np.int64))
        results = byref(how.struct), byref(end.struct), pointer(tokens)
        self._run("draw", ids, batch, rope_lengths, query_scale, native_cache, *results)
        return tokens[: end.struct.done]

    def _run(
        self,
        name: str,
        ids: Tensor,
        batch: AttentionBatch,
        rope_lengths: Tensor,
        query_scale: Tensor | None,
        cache: NativeCache,
        *results: object,
    ) -> None:
        tokens = bind_batch(batch, ids.contiguous())
        ropes = self._fixed_ropes or self._bind_ropes(rope_lengths)
        scale = None if query_scale is None else floats(query_scale)
        bad = torch.from_numpy(np.empty(batch.query_starts[-1], dtype=np.uint8))
        step = byref(self._model), cache.structs, byref(tokens.struct), ropes.structs, len(ropes.memory)
        if self._native.call(name, *step, pointer(scale), pointer(bad), *results):
            check_finite(bad == 0)

    def logits(self, hidden: Tensor) -> Tensor:
        """As `Decoder.logits`."""
        rows = floats(hidden)
        out = torch.empty(len(rows), self._spec.vocab_size)
        self._native.call("logits", byref(self._model), pointer(rows), len(rows), pointer(out))
        return out

    def _cache(self, layers: Sequence[KVLayer]) -> NativeCache | None:
        bound = self._bound  # another thread may replace it meanwhile
        if bound[0] is not layers:
            known = all(is_native(layer, self._spec.head_dim) for layer in layers)
            bound = self._bound = layers, bind_cache(layers) if known else None
        return bound[1]

    def _bind_ropes(self, lengths: Tensor) -> _NativeRopes:
        memory = tuple(rope.frequencies(lengths) for rope in self._ropes)
        found = [
            structs.Rope(pointer(rows), *rows.shape, rope.factor)
            for rows, rope in zip(memory, self._ropes, strict=True)
        ]
        return _NativeRopes((structs.Rope * len(found))(*found), memory)

    def _bind_model(self, shapes: Sequence[AttentionShape], ropes: tuple[RopeSpec, ...]) -> structs.Model:
        spec, weights = self._spec, self._weights
        layers = [
            self._bind_layer(layer, shape, -1 if it.rope is None else ropes.index(it.rope))
            for layer, shape, it in zip(weights.layers, shapes, spec.layers, strict=True)
        ]
        self._layers = (structs.Layer * len(layers))(*layers)
        return structs.Model(
            hidden=spec.hidden_size,
            intermediate=spec.intermediate_size,
            layers=len(layers),
            activation=structs.ACTIVATIONS[spec.activation],
            eps=spec.rms_eps,
            embedding_scale=spec.embedding_scale,
            final_softcap=spec.final_softcap or 0.0,
            layer=cast(self._layers, POINTER(structs.Layer)),
            norm=self._kept(weights.norm),
            embedding=weights.embedding.struct,
            head=self._linear(weights.head),
        )

    def _bind_layer(self, layer: LayerWeights, shape: AttentionShape, rope: int) -> structs.Layer:
        attention, mlp = layer.attention, layer.mlp
        return structs.Layer(
            input_norm=self._kept(layer.input_norm),
            mlp_norm=self._kept(layer.mlp_norm),
            post_attention_norm=self._kept(layer.post_attention_norm),
            post_mlp_norm=self._kept(layer.post_mlp_norm),
            q_norm=self._kept(attention.q_norm),
            k_norm=self._kept(attention.k_norm),
            qkv=self._linear(attention.qkv),
            out=self._linear(attention.out),
            gate_up=self._linear(mlp.gate_up),
            down=self._linear(mlp.down),
            attention=bind_shape(shape),
            rope=rope,
        )

    def _linear(self, linear: Linear) -> structs.Linear:
        return structs.Linear(linear.weight.struct, self._kept(linear.bias))

    def _kept(self, x: Tensor | None) -> c_void_p | int | None:
        if x is None:
            return None
        self._memory.append(floats(x))
        return pointer(self._memory[-1])
