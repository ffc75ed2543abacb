"""Batches over a blocked KV cache, with constants such as a calibrated model has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from gpu.machine import Machine
from kvant.cache.blocks import Paging
from kvant.cache.store import KVStore
from kvant.formats.kv import KV_FORMATS, KVLayer, KVPlan, KVShape, LayerPlan
from kvant.formats.kv_stats import Centre, LayerStats
from kvant.kernels.ops import AttentionBatch
from kvant.models.spec import RopeSpec
from kvant.quantize.kv_constants import layer_plan
from kvant.quantize.kv_statistics import LayerStatistics

BLOCK_SIZE = 64
_TEMPLATE_BLOCKS = 4


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer."""

    queries: int
    kv: int
    dim: int


@dataclass(frozen=True)
class Scene:
    """A step's batch and one layer of the cache, on the device; `store` is the same cache on the host."""

    cache: KVLayer
    batch: AttentionBatch
    store: KVStore | None = None


@cache
def made_up_plan(format_name: str, kv_heads: int, head_dim: int) -> LayerPlan:
    """The format with made-up constants: keys with a mean and outliers, queries in few directions."""
    generator = torch.Generator().manual_seed(11)

    def random(*shape: int) -> Tensor:
        return torch.randn(kv_heads, *shape, generator=generator)

    directions = random(head_dim, head_dim) * random(1, head_dim).exp()
    spread, reach = random(head_dim).mul(0.5).exp(), torch.full((kv_heads,), 5.0)
    statistics = LayerStatistics(
        key_mean=random(head_dim) * 2,
        key_variance=spread.square(),
        query_moment=directions @ directions.mT / head_dim,
        key_range=reach,
        value_range=reach,
        shaped_key_range=8 * reach,
    )
    return layer_plan(KV_FORMATS[format_name], statistics, RopeSpec(dim=head_dim))


def plan_on(machine: Machine, plan: LayerPlan) -> LayerPlan:
    """The same plan, its constants on the device."""
    key, value = (_stats_on(machine, stats) for stats in (plan.key_stats, plan.value_stats))
    return replace(plan, key_stats=key, value_stats=value)


def _stats_on(machine: Machine, stats: LayerStats) -> LayerStats:
    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(machine.device)

    centre = stats.centre
    if centre is not None:
        centre = Centre(centre.coefficients.to(machine.device), centre.frequencies.to(machine.device))
    return LayerStats(centre, moved(stats.balance), moved(stats.feedback), moved(stats.scale))


def allocate(machine: Machine, shape: KVShape, plan: KVPlan, num_blocks: int, block_size: int) -> KVStore:
    """The pool, on the device."""
    if not machine.cuda:
        return KVStore.allocate(shape, plan, num_blocks, block_size)
    return KVStore.allocate(shape, plan, num_blocks, block_size, machine.device)


def written_scene(
    machine: Machine, fmt: str, heads: Heads, lengths: Sequence[tuple[int, int]], block_size: int = BLOCK_SIZE
) -> Scene:
    """Sequences of (tokens known before, tokens of this step), each with random keys and values of its own."""
    plan = KVPlan(fmt, (made_up_plan(fmt, heads.kv, heads.dim),))
    paging, contexts = Paging(block_size, plan.lead), [before + new for before, new in lengths]
    tables = _tables([paging.blocks_for(context) for context in contexts])
    store = KVStore.allocate(KVShape(1, heads.kv, heads.dim), plan, int(tables.max()) + 2, block_size)
    store.blocks.copy_(torch.randint(0, 256, store.blocks.shape, dtype=torch.uint8))  # what nobody may read
    for table, context in zip(tables, contexts, strict=True):
        positions = torch.arange(context)
        vectors = torch.randn(2, heads.kv, context, heads.dim) + torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
        store.layers[0].write(*vectors, _slots(table, positions, paging), positions)
    return Scene(layer_on(machine, store, heads), batch_on(machine, lengths, tables, paging), store)


def layer_on(machine: Machine, store: KVStore, heads: Heads) -> KVLayer:
    """A copy of the first layer of a store on the host, on the device."""
    layer = store.layers[0]
    plan = KVPlan(layer.format.name, (plan_on(machine, layer.plan),))
    shape = KVShape(1, heads.kv, heads.dim)
    there = allocate(machine, shape, plan, store.num_blocks, layer.block_size)
    there.blocks.copy_(store.blocks)
    return there.layers[0]


def filled_scene(machine: Machine, fmt: str, heads: Heads, lengths: Sequence[tuple[int, int]]) -> Scene:
    """The same, large and for timing: the blocks hold copies of a few that were written."""
    plan = KVPlan(fmt, (plan_on(machine, made_up_plan(fmt, heads.kv, heads.dim)),))
    paging, contexts = Paging(BLOCK_SIZE, plan.lead), [before + new for before, new in lengths]
    tables = _tables([paging.blocks_for(context) for context in contexts])
    store = allocate(machine, KVShape(1, heads.kv, heads.dim), plan, int(tables.max()) + 1, BLOCK_SIZE)
    template = _template(fmt, heads).to(machine.device)
    store.blocks.copy_(template[torch.arange(store.num_blocks, device=machine.device) % (_TEMPLATE_BLOCKS - 1) + 1])
    store.blocks[tables[:, 0].to(machine.device)] = template[0]  # where the sinks are
    return Scene(store.layers[0], batch_on(machine, lengths, tables, paging))


@cache
def _template(fmt: str, heads: Heads) -> Tensor:
    """The bytes of a short sequence's blocks, [blocks, bytes]."""
    plan = KVPlan(fmt, (made_up_plan(fmt, heads.kv, heads.dim),))
    store = KVStore.allocate(KVShape(1, heads.kv, heads.dim), plan, _TEMPLATE_BLOCKS, BLOCK_SIZE)
    positions = torch.arange(store.paging.capacity(_TEMPLATE_BLOCKS))
    vectors = torch.randn(2, heads.kv, len(positions), heads.dim)
    store.layers[0].write(*vectors, positions + plan.lead, positions)
    return store.blocks


def _tables(counts: Sequence[int]) -> Tensor:
    """Blocks of each sequence, anywhere in the pool: [sequences, most]; the padding is a block of nobody's."""
    tables = torch.full((len(counts), max(counts)), sum(counts))
    for row, blocks in enumerate(torch.randperm(sum(counts)).split(list(counts))):
        tables[row, : len(blocks)] = blocks
    return tables


def _slots(table: Tensor, positions: Tensor, paging: Paging) -> Tensor:
    numbers = positions + paging.lead
    return table[numbers // paging.block_size] * paging.block_size + numbers % paging.block_size


def batch_on(machine: Machine, lengths: Sequence[tuple[int, int]], tables: Tensor, paging: Paging) -> AttentionBatch:
    """The step as the ops take it."""
    positions = [torch.arange(before, before + new) for before, new in lengths]
    slots = [_slots(table, p, paging) for table, p in zip(tables, positions, strict=True)]
    starts = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0)
    return AttentionBatch(
        positions=torch.cat(positions).to(machine.device),
        slots=torch.cat(slots).to(machine.device),
        query_starts=tuple(starts.tolist()),
        context_lens=tuple(before + new for before, new in lengths),
        block_tables=tables.to(machine.device),
    )
