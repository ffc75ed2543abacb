"""Measuring KV statistics: the model reads some text, and every layer's queries, keys and values are looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kvant.errors import NotFiniteError
from kvant.formats.kv import KV_FORMATS, SINKS, KVLayer, KVPlan
from kvant.formats.kv_codecs import FloatCodec, ShapedCodec
from kvant.kernels.ops import AttentionBatch, Ops
from kvant.models.decoder import Decoder
from kvant.models.forcing import force, new_store
from kvant.models.spec import RopeSpec
from kvant.quantize.kv_constants import key_shape
from kvant.quantize.kv_statistics import KVStatistics, LayerStatistics

Progress = Callable[[int, int], None]


def measure_kv(decoder: Decoder, windows: Sequence[Sequence[int]], progress: Progress | None = None) -> KVStatistics:
    """Statistics of a model over texts.

    Args:
        decoder: the model; it computes with a float32 cache.
        windows: token ids of texts, each longer than the sinks.
        progress: called after each window with how many are done, and how many there are.

    Raises:
        NotFiniteError: the model's queries, keys or values are not finite.
    """
    spec = decoder.spec
    plan = KVPlan.uniform(KV_FORMATS["fp32"], len(spec.layers))
    sums = [_Sums(spec.num_kv_heads, spec.head_dim) for _ in spec.layers]
    held: list[list[tuple[Tensor, Tensor]]] = [[] for _ in spec.layers]
    for done, ids in enumerate(windows, start=1):
        store = new_store(decoder, plan, len(ids))
        watched = _Watched(decoder.ops, dict(zip(map(id, store.layers), sums, strict=True)))
        force(decoder.with_ops(cast(Ops, watched)), store, ids, len(ids))
        for layer, kept in zip(store.layers, held, strict=True):
            blocks = torch.arange(store.num_blocks)
            kept.append((layer.read("key", blocks)[:, : len(ids)], layer.read("value", blocks)[:, : len(ids)]))
        if progress is not None:
            progress(done, len(windows))
    layers = [_layer(of_layer, kept, layer.rope) for of_layer, kept, layer in zip(sums, held, spec.layers, strict=True)]
    return KVStatistics(tuple(layers), sum(map(len, windows)))


class _Sums:
    """Running sums over one layer's tokens."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self.tokens = 0
        self.keys = torch.zeros(kv_heads, head_dim, dtype=torch.float64)
        self.squares = torch.zeros_like(self.keys)
        self.queries = torch.zeros(kv_heads, head_dim, head_dim, dtype=torch.float64)

    def add(self, q: Tensor, k: Tensor) -> None:
        """q [tokens, heads, head_dim], k [tokens, kv_heads, head_dim], both before RoPE."""
        keys = k.double()
        self.tokens += len(k)
        self.keys += keys.sum(0)
        self.squares += keys.square().sum(0)
        rows = q.float().unflatten(1, (k.shape[1], -1)).permute(1, 0, 2, 3).flatten(1, 2)
        self.queries += (rows.mT @ rows).double() / (q.shape[1] // k.shape[1])

    @property
    def key_mean(self) -> Tensor:
        return (self.keys / self.tokens).float()

    @property
    def key_variance(self) -> Tensor:
        return (self.squares / self.tokens - (self.keys / self.tokens).square()).clamp(min=0).float()

    @property
    def query_moment(self) -> Tensor:
        return (self.queries / self.tokens).float()


class _Watched:
    """A backend's ops that add what `rope_write_kv` is given to the sums of the layer, known by its cache."""

    def __init__(self, ops: Ops, sums: dict[int, _Sums]) -> None:
        self._ops = ops
        self._sums = sums

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def rope_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVLayer,
        batch: AttentionBatch,
    ) -> Tensor:
        counted = batch.positions >= SINKS
        self._sums[id(cache)].add(q[counted], k[counted])
        return self._ops.rope_write_kv(q, k, v, rotary, cache, batch)


def _layer(sums: _Sums, held: Sequence[tuple[Tensor, Tensor]], rope: RopeSpec | None) -> LayerStatistics:
    def largest(vectors: Sequence[Tensor]) -> Tensor:
        return torch.stack([x.abs().amax((1, 2)) for x in vectors]).amax(0)

    moments = (sums.key_mean, sums.key_variance, sums.query_moment)
    codec, shape = ShapedCodec(FloatCodec(torch.float32)), key_shape(*moments, rope)
    keys, values = [k for k, _ in held], [v for _, v in held]
    layer = LayerStatistics(
        *moments,
        key_range=largest(keys),
        value_range=largest(values),
        shaped_key_range=largest([codec.shaped(k, torch.arange(k.shape[1]), shape) for k in keys]),
    )
    if not all(torch.isfinite(x).all() for x in vars(layer).values()):
        raise NotFiniteError(
            "the model's queries, keys or values are not finite on the calibration text; run it in another dtype, such "
            "as float32"
        )
    return layer
