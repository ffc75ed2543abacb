"""Measuring KV statistics: the model reads some text, and every layer's queries, keys and values are looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from kvant.cache.memory import available_memory
from kvant.errors import MemoryFitError, NotFiniteError
from kvant.formats.kv import KV_FORMATS, SINKS, KVLayer, KVPlan
from kvant.formats.kv_codecs import FloatCodec, ShapedCodec
from kvant.kernels.ops import AttentionBatch, Ops
from kvant.models.decoder import Decoder
from kvant.models.forcing import force, new_store
from kvant.models.spec import ModelSpec, RopeSpec
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
        MemoryFitError: the texts are too long to be held.
    """
    spec = decoder.spec
    _check_memory(spec, sum(map(len, windows)))
    plan = KVPlan.uniform(KV_FORMATS["fp32"], len(spec.layers))
    layers = [_Layer(spec.num_kv_heads, spec.head_dim) for _ in spec.layers]
    for done, ids in enumerate(windows, start=1):
        store = new_store(decoder, plan, len(ids))
        watched = _Watched(decoder.ops, dict(zip(map(id, store.layers), layers, strict=True)))
        force(decoder.with_ops(cast(Ops, watched)), store, ids, len(ids))
        for kept, layer in zip(store.layers, layers, strict=True):
            blocks = torch.arange(store.num_blocks, device=decoder.ops.device)
            keys, values = (kept.read(side, blocks)[:, : len(ids)].cpu() for side in ("key", "value"))
            layer.end_text(keys, values)
        if progress is not None:
            progress(done, len(windows))
    found = [layer.statistics(of.rope, spec.max_position) for layer, of in zip(layers, spec.layers, strict=True)]
    return KVStatistics(tuple(found), sum(map(len, windows)))


def _check_memory(spec: ModelSpec, tokens: int) -> None:
    """The keys of all texts are held in 16 bit."""
    needed = 2 * tokens * len(spec.layers) * spec.num_kv_heads * spec.head_dim
    if needed > available_memory():
        raise MemoryFitError(
            f"measuring on {tokens:,} tokens takes {needed / 2**30:.1f} GiB, {available_memory() / 2**30:.1f} GiB are "
            "free; take fewer or shorter samples"
        )


class _Layer:
    """What is seen of one layer: running sums before RoPE, the largest values, and the keys after RoPE."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        self._tokens = 0
        self._sum = torch.zeros(kv_heads, head_dim, dtype=torch.float64)
        self._squares = torch.zeros_like(self._sum)
        self._queries = torch.zeros(kv_heads, head_dim, head_dim, dtype=torch.float64)
        self._key_range = self._value_range = torch.zeros(kv_heads)
        self._keys: list[Tensor] = []

    def add(self, q: Tensor, k: Tensor) -> None:
        """q [tokens, heads, head_dim], k [tokens, kv_heads, head_dim], both before RoPE."""
        keys = k.double()
        self._tokens += len(k)
        self._sum += keys.sum(0)
        self._squares += keys.square().sum(0)
        rows = q.float().unflatten(1, (k.shape[1], -1)).permute(1, 0, 2, 3).flatten(1, 2)
        self._queries += (rows.mT @ rows).double() / (q.shape[1] // k.shape[1])

    def end_text(self, keys: Tensor, values: Tensor) -> None:
        """A text's keys after RoPE and its values, [kv_heads, tokens, head_dim]."""
        self._key_range = torch.maximum(self._key_range, _largest(keys))
        self._value_range = torch.maximum(self._value_range, _largest(values))
        self._keys.append(keys.bfloat16())  # their range after shaping need not be known better

    def statistics(self, rope: RopeSpec | None, longest: int) -> LayerStatistics:
        mean = self._sum / self._tokens
        variance = (self._squares / self._tokens - mean.square()).clamp(min=0)
        moments = (mean.float(), variance.float(), (self._queries / self._tokens).float())
        codec, shape = ShapedCodec(FloatCodec(torch.float32)), key_shape(*moments, rope, longest)
        ranges = [_largest(codec.shaped(keys, torch.arange(keys.shape[1]), shape)) for keys in self._keys]
        found = LayerStatistics(*moments, self._key_range, self._value_range, torch.stack(ranges).amax(0))
        if not all(x.isfinite().all() for x in vars(found).values()):
            raise NotFiniteError(
                "the model's queries, keys or values are not finite on the calibration text; run it in another dtype, "
                "such as float32"
            )
        return found


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of each KV head, [kv_heads]."""
    return x.abs().amax((1, 2))


class _Watched:
    """A backend's ops that add what `rope_write_kv` is given to what is seen of the layer, known by its cache."""

    def __init__(self, ops: Ops, layers: dict[int, _Layer]) -> None:
        self._ops = ops
        self._layers = layers

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
        self._layers[id(cache)].add(q[counted].cpu(), k[counted].cpu())
        return self._ops.rope_write_kv(q, k, v, rotary, cache, batch)
