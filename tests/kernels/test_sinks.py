"""Ops on caches that keep the first tokens of a text in 16 bit, beside layers that only share their block tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from kvant.cache.blocks import Paging
from kvant.cache.store import KVStore
from kvant.formats.kv import KV_FORMATS, SINK_SPAN, KVFormat, KVLayer, KVPlan, KVShape
from kvant.formats.kv_codecs import AffineCodec
from kvant.kernels.ops import AttentionBatch, AttentionShape, Ops
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.select import available_backends
from tests.formats.oracle import assert_encodes
from tests.formats.stats import layer_plan_of
from tests.kernels import oracle
from tests.kernels.scenes import planes_at, slots_of
from tests.kernels.tolerances import IN_AN_ELEMENT, rounded_bits

FEWER_SINKS = KVFormat("k8v4-plain", AffineCodec(8), AffineCodec(4), "", sinks=2)
LAYERS = (KV_FORMATS["int4"], FEWER_SINKS, KV_FORMATS["fp16"], KV_FORMATS["k8v4"])


def plan_of(kv_heads: int, head_dim: int) -> KVPlan:
    """Layers that keep 4, 2 and no sinks, those of registered formats with the constants they work with."""
    return KVPlan("mixed", tuple(layer_plan_of(fmt, kv_heads, head_dim, seed) for seed, fmt in enumerate(LAYERS)))


@pytest.fixture(params=sorted(available_backends()), scope="module")
def ops(request: pytest.FixtureRequest) -> Ops:
    return available_backends()[request.param]()


@dataclass(frozen=True)
class Texts:
    """Sequences whose blocks lie anywhere in a store: keys and values of each, [2, tokens, kv_heads, head_dim]."""

    store: KVStore
    tables: Tensor
    vectors: tuple[Tensor, ...]

    def step(self, spans: list[tuple[int, int]]) -> AttentionBatch:
        """The batch that computes the tokens [start, stop) of each sequence."""
        paging = self.store.paging
        positions = [torch.arange(start, stop) for start, stop in spans]
        slots = [slots_of(table, p, paging) for table, p in zip(self.tables, positions, strict=True)]
        return AttentionBatch(
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            query_starts=tuple(accumulate((stop - start for start, stop in spans), initial=0)),
            context_lens=tuple(stop for _, stop in spans),
            block_tables=self.tables,
        )

    def write(self, ops: Ops, cache: KVLayer, spans: list[tuple[int, int]]) -> None:
        k, v = (
            torch.cat([x[side, slice(*span)] for x, span in zip(self.vectors, spans, strict=True)]) for side in (0, 1)
        )
        ops.rope_write_kv(k, k, v, None, cache, self.step(spans))

    def held(self, cache: KVLayer, text: int, side: str) -> Tensor:
        """What the cache holds of a text, [kv_heads, tokens, head_dim]: as the format makes it of the vectors.

        Where a rounding may fall either way, as of a scale after a rotation, either is right.
        """
        x, table = self.vectors[text][("key", "value").index(side)].transpose(0, 1), self.tables[text]
        plan, sinks, positions = cache.plan, cache.format.sinks, torch.arange(x.shape[1])
        codec, stats = (plan.format.key, plan.key_stats) if side == "key" else (plan.format.value, plan.value_stats)
        planes = planes_at(cache, side, slots_of(table, positions[sinks:], self.store.paging))
        assert_encodes(codec, planes, x[:, sinks:], positions[sinks:], stats)
        found = cache.read(side, table)[:, : x.shape[1]]
        assert torch.equal(found[:, :sinks], x[:, :sinks].half().float())
        return found


def texts(lengths: list[int], kv_heads: int, head_dim: int, block_size: int, seed: int) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    plan = plan_of(kv_heads, head_dim)
    paging = Paging(block_size, plan.lead)
    counts = [paging.blocks_for(length) for length in lengths]
    store = KVStore.allocate(KVShape(len(LAYERS), kv_heads, head_dim), plan, sum(counts) + 1, block_size)
    for layer in store.layers:
        for plane in layer.planes.values():
            plane.view(torch.uint8).fill_(255)
    free = torch.randperm(sum(counts) + 1, generator=generator).tolist()
    spare = free.pop()
    owned = [[free.pop() for _ in range(count)] for count in counts]
    tables = torch.tensor([[*blocks, *[spare] * (max(counts) - len(blocks))] for blocks in owned])
    vectors = tuple(torch.randn(2, length, kv_heads, head_dim, generator=generator) for length in lengths)
    for x in vectors:
        x[:, 0] *= 100
    return Texts(store, tables, vectors)


@settings(max_examples=30)
@given(
    spans=st.lists(
        st.tuples(st.sampled_from((0, 0, 1, 3, 4, 5, 19)), st.sampled_from((1, 2, 4, 17))), min_size=1, max_size=3
    ),
    kv_heads=st.integers(1, 2), ratio=st.sampled_from((1, 3)), dim=st.sampled_from((16, 64)),
    block_size=st.sampled_from((16, 64)), window=st.sampled_from((None, 1, 5)), seed=st.integers(0, 999),
)  # fmt: skip
@example(spans=[(0, 17)], kv_heads=2, ratio=1, dim=64, block_size=16, window=1, seed=66)  # a scale between two words
def test_what_is_written_is_attended_to(ops, spans, kv_heads, ratio, dim, block_size, window, seed):
    """Two steps, the first of which may end within the sinks."""
    spans = [(before, before + new) for before, new in spans]
    it = texts([stop for _, stop in spans], kv_heads, dim, block_size, seed)
    shape = AttentionShape(kv_heads * ratio, kv_heads, dim, dim**-0.5, window)
    q = torch.randn(it.step(spans).query_starts[-1], shape.num_heads, dim, generator=torch.Generator().manual_seed(1))
    for cache in it.store.layers:
        coarse = IN_AN_ELEMENT[rounded_bits(ops, cache.format, dim)]
        if any(start for start, _ in spans):
            it.write(ops, cache, [(0, start) for start, _ in spans])
        it.write(ops, cache, spans)
        found = ops.attention(q, cache, it.step(spans), shape)
        for text, (start, stop) in enumerate(pairwise(it.step(spans).query_starts)):
            keys, values = (it.held(cache, text, side).double().numpy() for side in ("key", "value"))
            for token in range(start, stop):
                position = spans[text][0] + token - start
                expected = oracle.attend(q[token].double().numpy(), keys, values, position, shape)
                error = (found[token].double() - torch.tensor(expected)).abs().max()
                # Weights in 16 bit miss a value by a part of the largest one.
                allowed = 1e-4 if coarse else 2e-5
                assert error <= allowed * abs(values).max() + coarse * max(abs(expected).max(), 1.0)


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_a_step_writes_the_slots_of_its_own_tokens_only(ops, layer):
    """Each text continues where it was: before the sinks, among them, behind them."""
    spans = [(0, 2), (1, 3), (3, 9), (4, 5), (20, 37)]
    it = texts([stop for _, stop in spans], 2, 16, 16, seed=3)
    cache = it.store.layers[layer]
    it.write(ops, cache, [(0, start) for start, _ in spans])
    before = {name: plane.view(torch.uint8).clone() for name, plane in cache.planes.items()}
    it.write(ops, cache, spans)
    sinks = cache.format.sinks
    for name, plane in cache.planes.items():
        changed = (plane.view(torch.uint8) != before[name]).flatten(3).any(-1).any(1)
        mine = torch.zeros_like(changed)
        for table, span in zip(it.tables, spans, strict=True):
            for position in range(*span):
                codes = name.endswith((".codes", ".data"))
                first = [SINK_SPAN * position + i for i in range(SINK_SPAN)] if codes else []
                for number in first if position < sinks else [position + it.store.paging.lead]:
                    mine[table[number // 16], number % 16] = True
        assert not (changed & ~mine).any(), name


def test_the_reference_gives_a_token_the_same_bits_in_steps_of_any_size():
    """Where the lead shifts tokens into another tile of the context too."""
    ops, length = ReferenceOps(), 150
    it = texts([length, 20], 2, 16, 16, seed=4)
    shape = AttentionShape(4, 2, 16, 0.25)
    q = torch.randn(length + 20, 4, 16, generator=torch.Generator().manual_seed(5))
    for cache in it.store.layers:
        it.write(ops, cache, [(0, length), (0, 20)])
        whole = ops.attention(q, cache, it.step([(0, length), (0, 20)]), shape)
        alone = replace(it, tables=it.tables[:1])
        for edges in ((0, 1, 2, 3, 4, 5, 6), (0, 3, 7, 115, 116, 117, 118, 127, 128, 129, 150)):
            for start, stop in pairwise(edges):
                found = ops.attention(q[start:stop], cache, alone.step([(start, stop)]), shape)
                assert torch.equal(found, whole[start:stop]), (start, stop)
