"""Ragged batches over a blocked cache whose unused slots hold loud nonsense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvant.cache.store import KVStore
from kvant.formats.kv import NO_STATS, KVFormat, KVLayer, KVShape
from kvant.kernels.ops import AttentionBatch


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
    fmt: KVFormat, kv_heads: int, head_dim: int, block_size: int, lengths: list[tuple[int, int]], seed: int
) -> Scene:
    """Sequences of (tokens known before, tokens of this step), their blocks anywhere in the pool."""
    generator = torch.Generator().manual_seed(seed)
    contexts = [before + new for before, new in lengths]
    counts = [-(-context // block_size) for context in contexts]
    store = KVStore.allocate(KVShape(1, kv_heads, head_dim), fmt, sum(counts) + 3, block_size)
    cache = store.layers[0]
    every = torch.arange((sum(counts) + 3) * block_size)
    write(cache, every, 50 * torch.randn(2, kv_heads, len(every), head_dim, generator=generator), every)
    free = torch.randperm(sum(counts) + 3, generator=generator).split([*counts, 3])
    tables = torch.full((len(lengths), max(counts) + 1), int(free[-1][0]))
    for row, blocks in enumerate(free[:-1]):
        tables[row, : len(blocks)] = blocks
    keys, values = [], []
    for row, context in enumerate(contexts):
        positions = torch.arange(context)
        slots = tables[row, positions // block_size] * block_size + positions % block_size
        write(cache, slots, torch.randn(2, kv_heads, context, head_dim, generator=generator), positions)
        for kept, found in zip((keys, values), read(cache, slots, positions), strict=True):
            kept.append(found)
    return Scene(cache, _batch(lengths, tables, block_size), keys, values)


def _batch(lengths: list[tuple[int, int]], tables: Tensor, block_size: int) -> AttentionBatch:
    positions = [torch.arange(before, before + new) for before, new in lengths]
    starts = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0)
    slots = [tables[row, p // block_size] * block_size + p % block_size for row, p in enumerate(positions)]
    return AttentionBatch(
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        query_starts=tuple(starts.tolist()),
        context_lens=tuple(before + new for before, new in lengths),
        block_tables=tables,
    )


def write(cache: KVLayer, slots: Tensor, vectors: Tensor, positions: Tensor) -> None:
    """Store keys and values, stacked [2, G, tokens, D], at these slots."""
    for side, codec, x in (("key", cache.format.key, vectors[0]), ("value", cache.format.value, vectors[1])):
        for name, codes in codec.encode(x, positions, NO_STATS).items():
            plane = cache.side(side)[name]
            for token, slot in enumerate(slots.tolist()):
                plane[slot // cache.block_size, :, slot % cache.block_size] = codes[:, token]


def read(cache: KVLayer, slots: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values at these slots, decoded, each [G, tokens, D]."""
    found = []
    for side, codec in (("key", cache.format.key), ("value", cache.format.value)):
        block, offset = slots // cache.block_size, slots % cache.block_size
        planes = {name: plane[block, :, offset].transpose(0, 1) for name, plane in cache.side(side).items()}
        found.append(codec.decode(planes, positions, NO_STATS))
    return found[0], found[1]
