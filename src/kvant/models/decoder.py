"""The one generic decoder: embeddings, layers, final norm, output head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.kernels.burst import Burst
from kvant.kernels.ops import AttentionBatch, Ops, SamplingBatch
from kvant.models.fused import fuse
from kvant.models.layers import DecoderWeights, TokenContext, attention_shape, computed, decoder_layer, log_n_scale
from kvant.models.rope import RotaryEmbedding
from kvant.models.spec import ModelSpec


class Decoder:
    """A model bound to a backend. It holds no state of any sequence: the KV cache is an argument.

    Whoever calls it often does so in `torch.inference_mode`: its weights ask for no gradients, but torch keeps looking.

    Args:
        spec: the model's.
        weights: prepared for the backend.
        ops: the backend.
        dtype: of activations; None takes what `ops.embedding` gives, which is float32 where the embedding is quantized.
    """

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, ops: Ops, dtype: torch.dtype | None = None) -> None:
        self.spec = spec
        self.ops = ops
        self._weights = weights
        self._dtype = dtype
        self._ropes = {
            layer.rope: RotaryEmbedding(layer.rope, ops.device) for layer in spec.layers if layer.rope is not None
        }
        shapes = [attention_shape(spec, layer) for layer in spec.layers]
        self._fused = fuse(spec, weights, ops, shapes, self._ropes)

    def with_ops(self, ops: Ops) -> Decoder:
        """The same model bound to other ops that take the same prepared weights."""
        return Decoder(self.spec, self._weights, ops, self._dtype)

    def forward(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        rope_lengths: Tensor,
        cache: Sequence[KVLayer],
        rows: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm, [R, hidden]; writes the tokens' KV into `cache`, one entry a layer.

        Args:
            ids: [T] int64 token ids.
            batch: where each token stands and where its KV lies.
            rope_lengths: [T] int64, see `models.rope.rope_lengths`.
            cache: the layers of the KV store.
            rows: [R] int64, the tokens whose hidden states are wanted, one at least; None: all in order. In the last
                layer the others' keys and values are written, and their way ends with attention at the latest.
        """
        assert rows is None or len(rows), "a step has somebody's states"
        ops, spec, query_scale = self.ops, self.spec, self._query_scale(batch)
        if self._fused is not None:
            hidden = self._fused.forward(ids, batch, rope_lengths, query_scale, cache, rows)
            if hidden is not None:
                return hidden
        rotary = {rope: embed(batch.positions, rope_lengths) for rope, embed in self._ropes.items()}
        x = ops.embedding(ids, self._weights.embedding) * spec.embedding_scale
        x = x if self._dtype is None else x.to(self._dtype)
        residual = torch.zeros_like(x)
        for layer, weights, kv in zip(spec.layers, self._weights.layers, cache, strict=True):
            going_on = rows if weights is self._weights.layers[-1] else None
            tokens = TokenContext(batch, rotary[layer.rope] if layer.rope else None, query_scale, going_on)
            shape = attention_shape(spec, layer)
            x, residual = computed(ops, decoder_layer(ops, x, residual, weights, spec, shape, kv, tokens))
        normed: Tensor = ops.add_rms_norm(x, residual, self._weights.norm, spec.rms_eps)[0]
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, hidden] -> logits [R, vocab] float32."""
        if self._fused is not None:
            return self._fused.logits(hidden)
        logits = self._weights.head(self.ops, hidden).float()
        cap = self.spec.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def draws(self) -> bool:
        """Whether the backend has `draw`."""
        return self._fused is not None

    def bursts(self, cache: Sequence[KVLayer]) -> bool:
        """Whether `draw` makes more than one step on such a cache."""
        return self._fused is not None and self._fused.bursts(cache) and self.spec.log_n_length is None

    def draw(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        rope_lengths: Tensor,
        cache: Sequence[KVLayer],
        wishes: SamplingBatch,
        burst: Burst,
    ) -> Tensor | None:
        """The token after each of a step's tokens: `forward`, `logits` and `Ops.sample` at once. [steps, T] int64.

        In a burst of more than one step, every token is its sequence's newest, and goes on from what it has drawn: the
        batch's block tables have room for that. None where the backend does not do that with this cache; then nothing
        has been done.

        Args:
            ids: as `forward` takes them, and so are batch, rope_lengths and cache.
            batch: see there.
            rope_lengths: see there.
            cache: see there.
            wishes: a row a token; `uniform` has one number for each of them in each of the burst's steps.
            burst: of one step at most where `bursts` is false.
        """
        if self._fused is None:
            return None
        return self._fused.draw(ids, batch, rope_lengths, self._query_scale(batch), cache, wishes, burst)

    def _query_scale(self, batch: AttentionBatch) -> Tensor | None:
        length = self.spec.log_n_length
        return None if length is None else log_n_scale(batch.positions, length)
