"""Ragged batches over a blocked cache whose unused slots hold loud nonsense."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kvant.cache.blocks import Paging
from kvant.cache.store import KVStore
from kvant.formats.kv import SINK_SPAN, KVFormat, KVLayer, KVPlan, KVShape, LayerPlan
from kvant.formats.kv_codecs import Planes
from kvant.kernels.ops import AttentionBatch, AttentionShape
from tests.formats.stats import layer_plan_of
from tests.kernels import oracle


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Scene:
    """A step over several sequences.

    Attributes:
        cache: one layer; the contexts' keys and values are in it, those of the step's own tokens included.
        keys, values: of each sequence [G, context, D] float32, as the cache holds them.
    """

    cache: KVLayer
    batch: AttentionBatch
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def tokens(self) -> int:
        return self.batch.query_starts[-1]


def scene(
    layer: LayerPlan, kv_heads: int, head_dim: int, block_size: int, lengths: list[tuple[int, int]], seed: int
) -> Scene:
    """Sequences of (tokens known before, tokens of this step), their blocks anywhere in the pool."""
    generator = torch.Generator().manual_seed(seed)
    plan = KVPlan(layer.format.name, (layer,))
    paging = Paging(block_size, plan.lead)
    contexts = [before + new for before, new in lengths]
    counts = [paging.blocks_for(context) for context in contexts]
    store = KVStore.allocate(KVShape(1, kv_heads, head_dim), plan, sum(counts) + 3, block_size)
    cache = store.layers[0]
    every = torch.arange((sum(counts) + 3) * block_size)
    noise = 50 * torch.randn(2, kv_heads, len(every), head_dim, generator=generator)
    cache.write(*noise, every, every + layer.format.sinks)
    free = torch.randperm(sum(counts) + 3, generator=generator).split([*counts, 3])
    tables = torch.full((len(lengths), max(counts) + 1), int(free[-1][0]))
    for row, blocks in enumerate(free[:-1]):
        tables[row, : len(blocks)] = blocks
    keys, values = [], []
    for row, context in enumerate(contexts):
        positions = torch.arange(context)
        vectors = torch.randn(2, kv_heads, context, head_dim, generator=generator)
        cache.write(*vectors, slots_of(tables[row], positions, paging), positions)
        keys.append(cache.read("key", tables[row])[:, :context])
        values.append(cache.read("value", tables[row])[:, :context])
    return Scene(cache, _batch(lengths, tables, paging), keys, values)


def slots_of(table: Tensor, positions: Tensor, paging: Paging) -> Tensor:
    numbers = positions + paging.lead
    return table[numbers // paging.block_size] * paging.block_size + numbers % paging.block_size


def _batch(lengths: list[tuple[int, int]], tables: Tensor, paging: Paging) -> AttentionBatch:
    positions = [torch.arange(before, before + new) for before, new in lengths]
    starts = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0)
    slots = [slots_of(tables[row], p, paging) for row, p in enumerate(positions)]
    return AttentionBatch(
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        query_starts=tuple(starts.tolist()),
        context_lens=tuple(before + new for before, new in lengths),
        block_tables=tables,
    )


def step_kv(it: Scene, cache: KVLayer) -> tuple[Tensor, Tensor]:
    """Keys and values that a cache laid out like the scene's holds for the step's own tokens, each [G, T, D]."""
    spans = zip(it.batch.block_tables, pairwise(it.batch.query_starts), it.batch.context_lens, strict=True)
    pieces = [(table, slice(end - (stop - start), end)) for table, (start, stop), end in spans]
    keys, values = (
        torch.cat([cache.read(side, table)[:, new] for table, new in pieces], dim=1) for side in ("key", "value")
    )
    return keys, values


def step_planes(it: Scene, side: str) -> Planes:
    """What the scene's cache holds on one side ("key", "value") for the step's tokens, but for sinks: [G, T, ...]."""
    return planes_at(it.cache, side, it.batch.slots[it.batch.positions >= it.cache.format.sinks])


def planes_at(cache: KVLayer, side: str, slots: Tensor) -> Planes:
    """What a cache holds on one side in slots [T], none of them sinks': [G, T, ...]."""
    block, offset = slots // cache.block_size, slots % cache.block_size
    return {name: plane[block, :, offset].transpose(0, 1) for name, plane in cache.side(side).items()}


def step_slots(it: Scene) -> Tensor:
    """The slots that the step may write."""
    slots, positions, sinks = it.batch.slots, it.batch.positions, it.cache.format.sinks
    first = (slots - it.cache.lead - positions + SINK_SPAN * positions)[positions < sinks]
    return torch.cat([slots[positions >= sinks], (first.unsqueeze(1) + torch.arange(SINK_SPAN)).flatten()])


def scene_of(
    fmt: KVFormat, kv_heads: int, dim: int, block_size: int, lengths: list[tuple[int, int]], seed: int
) -> Scene:
    """A scene in a format with made-up constants; blocks are large enough for its sinks."""
    layer: LayerPlan = layer_plan_of(fmt, kv_heads, dim, seed % 3)
    sink_slots = layer.format.lead + layer.format.sinks
    return scene(layer, kv_heads, dim, max(block_size, sink_slots), lengths, seed)


def attended(it: Scene, q: Tensor, shape: AttentionShape) -> Tensor:
    """What the scene's attention gives, [T, H, D] float64."""
    rows = []
    for sequence, (start, stop) in enumerate(pairwise(it.batch.query_starts)):
        keys, values = it.keys[sequence].double().numpy(), it.values[sequence].double().numpy()
        for token in range(start, stop):
            position = int(it.batch.positions[token])
            rows.append(torch.tensor(oracle.attend(q[token].double().numpy(), keys, values, position, shape)))
    return torch.stack(rows)
