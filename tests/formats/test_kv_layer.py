"""One layer's memory: each token's bytes are its own, whatever the order, the blocks and the neighbours."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kvant.errors import NotFiniteError
from kvant.formats.kv import KV_FORMATS, KVFormat, KVLayer, KVPlan, LayerPlan
from kvant.formats.kv_codecs import AffineCodec, FloatCodec, Plane, Planes, VectorCodec
from kvant.formats.kv_stats import NO_STATS, LayerStats
from tests.formats.stats import layer_plan_of

SPAN = 4  # slots of a token in 16 bit, written down once more: stored caches and other backends count on it
HALF, INT8, INT4 = FloatCodec(torch.float16), AffineCodec(8), AffineCodec(4)
CODECS: dict[str, tuple[VectorCodec, VectorCodec]] = {
    "fp16": (HALF, HALF),
    "int8": (INT8, INT8),
    "int4": (INT4, INT4),
    "k8v4": (INT8, INT4),
    "k16v4": (HALF, INT4),
}
FORMATS = [KVFormat(name, *codecs, "", sinks) for name, codecs in CODECS.items() for sinks in (0, 2, 4)]
SOME = settings(max_examples=60)
Token = tuple[int, int]  # which sequence, which position


def format_named(name: str, sinks: int) -> KVFormat:
    return next(fmt for fmt in FORMATS if (fmt.name, fmt.sinks) == (name, sinks))


@dataclass(frozen=True)
class Texts:
    """Some sequences, their keys and values [2, kv_heads, tokens, head_dim], and their blocks anywhere in a pool."""

    plan: KVPlan
    block_size: int
    num_blocks: int
    tables: tuple[list[int], ...]
    vectors: tuple[Tensor, ...]

    @property
    def tokens(self) -> list[Token]:
        return [(text, position) for text, x in enumerate(self.vectors) for position in range(x.shape[2])]

    def slot(self, text: int, number: int) -> int:
        """The pool's slot that is a sequence's slot of this number."""
        return self.tables[text][number // self.block_size] * self.block_size + number % self.block_size

    def layers(self) -> list[KVLayer]:
        """The plan's layers, full of what others left there."""
        _, heads, _, dim = self.vectors[0].shape
        generator = torch.Generator().manual_seed(0)

        def noise(plane: Plane) -> Tensor:
            shape = (self.num_blocks, heads, self.block_size, plane.bytes)
            return torch.randint(256, shape, dtype=torch.uint8, generator=generator).view(plane.dtype)

        def layer(plan: LayerPlan) -> KVLayer:
            planes = {plane.name: noise(plane) for plane in plan.format.planes(dim)}
            return KVLayer(plan, self.block_size, self.plan.lead, planes)

        return [layer(plan) for plan in self.plan.layers]

    def write(self, layer: KVLayer, tokens: list[Token]) -> None:
        """Store these tokens in one call."""
        positions = torch.tensor([position for _, position in tokens])
        slots = torch.tensor([self.slot(text, position + self.plan.lead) for text, position in tokens])
        k, v = (torch.stack([self.vectors[text][side][:, p] for text, p in tokens], dim=1) for side in (0, 1))
        layer.write(k, v, slots, positions)


@st.composite
def texts(draw: st.DrawFn) -> Texts:
    """Several layers of different formats under one lead, those that are registered with the constants they work with.

    Lengths lie about the ends of the sinks and of blocks.
    """
    formats = draw(st.lists(st.sampled_from([*FORMATS, *KV_FORMATS.values()]), min_size=1, max_size=3))
    heads, dim = draw(st.sampled_from(((1, 8), (2, 16), (3, 24))))
    plan = KVPlan("mixed", tuple(layer_plan_of(fmt, heads, dim, seed) for seed, fmt in enumerate(formats)))
    block_size = draw(st.sampled_from((16, 32)))
    lengths = draw(st.lists(st.sampled_from((1, 2, 3, 4, 5, 15, 16, 17, 20, 21, 37)), min_size=1, max_size=3))
    counts = [-(-(length + plan.lead) // block_size) + draw(st.integers(0, 1)) for length in lengths]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    free = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    vectors = [torch.randn(2, heads, length, dim, generator=generator) for length in lengths]
    for x in vectors:
        x[:, :, 0, 0] *= 1e6  # beyond float16
    tables = tuple([free.pop() for _ in range(count)] for count in counts)
    return Texts(plan, block_size, sum(counts) + 2, tables, tuple(vectors))


@st.composite
def splits(draw: st.DrawFn, tokens: list[Token]) -> list[list[Token]]:
    """The tokens in any order, cut anywhere: pieces may hold tokens of several sequences."""
    tokens = list(tokens)
    random.Random(draw(st.integers(0, 999))).shuffle(tokens)
    cuts = draw(st.lists(st.integers(1, len(tokens)), max_size=8))
    edges = sorted({0, *cuts, len(tokens)})
    return [tokens[start:stop] for start, stop in pairwise(edges)]


def round_trip(plan: LayerPlan, side: str, x: Tensor) -> Tensor:
    """What reading x [kv_heads, tokens, head_dim] back should give, its first tokens in 16 bit."""
    fmt = plan.format
    codec, stats = (fmt.key, plan.key_stats) if side == "key" else (fmt.value, plan.value_stats)
    positions = torch.arange(x.shape[1])[fmt.sinks :]
    rest = codec.decode(codec.encode(x[:, fmt.sinks :], positions, stats), positions, stats)
    return torch.cat([x[:, : fmt.sinks].clamp(-65504, 65504).half().float(), rest], dim=1)


def raw(planes: Planes) -> dict[str, Tensor]:
    """The bytes of each plane: [num_blocks, kv_heads, block_size, bytes]."""
    return {name: plane.view(torch.uint8).clone() for name, plane in planes.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(plane, second[name]) for name, plane in first.items())


@SOME
@given(it=texts(), data=st.data())
def test_what_was_written_in_any_order_is_read_back_in_the_texts(it, data):
    for layer in it.layers():
        for tokens in data.draw(splits(it.tokens)):
            it.write(layer, tokens)
        for table, vectors in zip(it.tables, it.vectors, strict=True):
            for side, x in zip(("key", "value"), vectors, strict=True):
                found = layer.read(side, torch.tensor(table))
                assert found.shape == (x.shape[0], len(table) * it.block_size, x.shape[2])
                assert found.dtype == torch.float32
                assert torch.equal(found[:, : x.shape[1]], round_trip(layer.plan, side, x))
                assert not found[:, found.shape[1] - it.plan.lead :].any()


@SOME
@given(it=texts(), data=st.data())
def test_every_split_gives_the_same_bytes(it, data):
    for whole, split in zip(it.layers(), it.layers(), strict=True):
        it.write(whole, it.tokens)
        for tokens in data.draw(splits(it.tokens)):
            it.write(split, tokens)
        assert same(raw(whole.planes), raw(split.planes))


@SOME
@given(it=texts(), data=st.data())
def test_a_write_touches_the_slots_of_its_tokens_only(it, data):
    for layer in it.layers():
        for tokens in data.draw(splits(it.tokens)):
            before = raw(layer.planes)
            it.write(layer, tokens)
            after = raw(layer.planes)
            sinks, others = slots_of(it, layer.format, tokens)
            for name, plane in after.items():
                holds_sinks = name.removeprefix("key.").removeprefix("value.") in ("codes", "data")
                mine = torch.tensor([*others, *(sinks if holds_sinks else ())], dtype=torch.int64)
                for block, offset in zip(mine // it.block_size, mine % it.block_size, strict=True):
                    plane[block, :, offset] = before[name][block, :, offset]
            assert same(after, before)


def slots_of(it: Texts, fmt: KVFormat, tokens: list[Token]) -> tuple[list[int], list[int]]:
    """The pool's slots that hold the sinks among these tokens, and those that hold the others."""
    sinks = [it.slot(text, SPAN * p + i) for text, p in tokens if p < fmt.sinks for i in range(SPAN)]
    return sinks, [it.slot(text, p + it.plan.lead) for text, p in tokens if p >= fmt.sinks]


def one_text(fmt: KVFormat, length: int, head_dim: int = 8, lead: int | None = None) -> tuple[KVLayer, Tensor]:
    """A layer of four blocks of 16 slots, one text in blocks 2, 0 and 3, and the vectors [2, 1, length, head_dim]."""
    lead = fmt.lead if lead is None else lead
    planes = {p.name: torch.zeros(4, 1, 16, *p.shape, dtype=p.dtype) for p in fmt.planes(head_dim)}
    layer = KVLayer(LayerPlan(fmt), 16, lead, planes)
    x = torch.randn(2, 1, length, head_dim, generator=torch.Generator().manual_seed(1))
    write(layer, x, [2, 0, 3], torch.arange(length))
    return layer, x


def write(layer: KVLayer, x: Tensor, table: list[int], positions: Tensor) -> None:
    numbers = positions + layer.lead
    layer.write(*x[:, :, positions], torch.tensor(table)[numbers // 16] * 16 + numbers % 16, positions)


@pytest.mark.parametrize(("name", "filled"), [("int4", 16), ("int8", 32)])
def test_a_sinks_16_bit_lie_one_after_the_other_in_the_codes_of_its_slots(name, filled):
    """Eight elements are 16 bytes: all that four slots of 4 bits have, half of what four of 8 bits have."""
    layer, x = one_text(format_named(name, 4), length=9)
    for side, vectors in zip(("key", "value"), x, strict=True):
        taken = layer.planes[f"{side}.codes"][2, 0].view(4, filled)
        assert torch.equal(taken[:, :16].view(torch.float16), vectors[0, :4].half())
        assert not taken[:, 16:].any()
        assert not layer.planes[f"{side}.affine"][2].any(), "sinks need no scale"
        [codes, affine] = AffineCodec(4 if name == "int4" else 8).encode(vectors[:, 4:], None, NO_STATS).values()
        assert torch.equal(layer.planes[f"{side}.codes"][0, 0, :5], codes[0])
        assert torch.equal(layer.planes[f"{side}.affine"][0, 0, :5], affine[0])


def test_a_layer_without_sinks_leaves_the_lead_empty():
    layer, x = one_text(format_named("fp16", 0), length=9, lead=12)
    assert not layer.planes["key.data"][2, 0, :12].any()
    assert torch.equal(layer.planes["key.data"][2, 0, 12:], x[0, 0, :4].half())
    assert torch.equal(layer.planes["key.data"][0, 0, :5], x[0, 0, 4:].half())


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("common", range(1, 5))
def test_a_copy_of_the_first_block_keeps_the_sinks_in_common(name, common):
    """Two texts that part within the sinks: the second one writes its own behind those in the copied block."""
    layer, first = one_text(format_named(name, 4), length=12)
    for plane in layer.planes.values():
        plane[1] = plane[2]
    other = torch.cat([first[:, :, :common], -first[:, :, common:4]], dim=2)
    write(layer, other, [1], torch.arange(common, 4))
    for side, kept, new in zip(("key", "value"), first, other, strict=True):
        assert torch.equal(layer.read(side, torch.tensor([1]))[:, :4], new.half().float())
        assert torch.equal(layer.read(side, torch.tensor([2, 0]))[:, :12], round_trip(layer.plan, side, kept))


@pytest.mark.parametrize("name", CODECS)
def test_reading_does_not_see_the_blocks_of_others(name):
    layer, x = one_text(format_named(name, 4), length=12)
    for plane in layer.planes.values():
        plane.view(torch.uint8)[[1, 3]] = 255
    for side, vectors in zip(("key", "value"), x, strict=True):
        found = layer.read(side, torch.tensor([2, 0]))
        assert torch.equal(found[:, :12], round_trip(layer.plan, side, vectors))
        assert torch.equal(layer.read(side, torch.tensor([2]))[:, :4], found[:, :4])


@dataclass(frozen=True)
class Rolled(VectorCodec):
    """A codec that works with positions and statistics: vectors times the heads' scale, rolled by the position."""

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return (Plane("data", torch.float32, (head_dim,)),)

    def encode(self, x: Tensor, positions: Tensor, stats: LayerStats) -> Planes:
        return {"data": self._roll(x * stats.scale.view(-1, 1, 1), positions)}

    def decode(self, planes: Planes, positions: Tensor, stats: LayerStats) -> Tensor:
        return self._roll(planes["data"], -positions) / stats.scale.view(-1, 1, 1)

    def _roll(self, x: Tensor, positions: Tensor) -> Tensor:
        return torch.stack([x[:, i].roll(int(position), -1) for i, position in enumerate(positions)], dim=1)


@pytest.mark.parametrize(("sinks", "lead"), [(0, 0), (0, 12), (2, 12), (4, 12)])
def test_codecs_get_each_tokens_position_and_their_own_sides_statistics(sinks, lead):
    sides = {"key": LayerStats(scale=torch.tensor([2.0, 4.0])), "value": LayerStats(scale=torch.tensor([8.0, 16.0]))}
    plan = LayerPlan(KVFormat("rolled", Rolled(), Rolled(), "", sinks), sides["key"], sides["value"])
    planes = {p.name: torch.zeros(4, 2, 16, *p.shape, dtype=p.dtype) for p in plan.format.planes(8)}
    layer = KVLayer(plan, 16, lead, planes)
    x = torch.randn(2, 2, 30, 8, generator=torch.Generator().manual_seed(2)).half().float()
    for positions in torch.randperm(30, generator=torch.Generator().manual_seed(3)).split(7):
        write(layer, x, [2, 0, 3], positions)
    for side, vectors in zip(sides, x, strict=True):
        assert torch.equal(layer.read(side, torch.tensor([2, 0, 3]))[:, :30], vectors)
        for position in (sinks, 4, 29):
            block, offset = [2, 0, 3][(position + lead) // 16], (position + lead) % 16
            expected = (vectors[:, position] * sides[side].scale.unsqueeze(1)).roll(position, -1)
            assert torch.equal(layer.planes[f"{side}.data"][block, :, offset], expected)


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("side", "position"), [(0, 0), (0, 11), (1, 2), (1, 6)])
def test_what_is_not_finite_is_refused_before_anything_is_written(name, bad, side, position):
    """Of sinks and of others: one such element would make every later text of its prefix NaN."""
    plan = layer_plan_of(KV_FORMATS[name], kv_heads=1, head_dim=8)
    planes = {p.name: torch.zeros(4, 1, 16, *p.shape, dtype=p.dtype) for p in plan.format.planes(8)}
    layer = KVLayer(plan, 16, plan.format.lead, planes)
    x = torch.randn(2, 1, 12, 8, generator=torch.Generator().manual_seed(4))
    x[side, 0, position, 3] = bad
    x[0, 0, 8, 0] = bad
    with pytest.raises(
        NotFiniteError, match="keys or values are not finite: it overflows .*; try dtype='float32'"
    ) as it:
        write(layer, x, [2, 0, 3], torch.arange(12))
    assert it.value.tokens == tuple(sorted((position, 8)))
    assert not any(plane.view(torch.uint8).any() for plane in layer.planes.values())
