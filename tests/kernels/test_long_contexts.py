"""Attention to contexts of one unit of work and of many, and what a backend may round there."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from kvant.formats.kv import KV_FORMATS, KVFormat, KVLayer
from kvant.formats.kv_codecs import AffineCodec, FloatCodec, ShapedCodec, hadamard
from kvant.kernels.ops import AttentionShape
from kvant.kernels.select import select_ops
from tests.kernels.scenes import Scene, attended, random, scene_of
from tests.kernels.tolerances import ON_THE_WHOLE, code_bits, rounded_bits

# Cut where units of work may be cut.
LONG = [(17, 1), (511, 1), (512, 1), (1023, 2), (700, 20), (1300, 1)]
HALVES = FloatCodec(torch.float16)
OF_4_BIT_VALUES = [name for name, fmt in KV_FORMATS.items() if code_bits(fmt.value) == 4]
OF_4_BIT_KEYS = [name for name, fmt in KV_FORMATS.items() if code_bits(fmt.key) == 4]


@cache
def long_contexts(fmt: KVFormat, dim: int, window: int | None) -> tuple[Scene, Tensor, AttentionShape, Tensor]:
    """A scene of long contexts, queries, and what they get."""
    it = scene_of(fmt, 2, dim, 32, LONG, seed=1)
    shape, q = AttentionShape(4, 2, dim, 0.125, window), random(2, it.tokens, 4, dim)
    return it, q, shape, attended(it, q, shape)


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize(("dim", "window"), [(64, None), (64, 100), (128, 600)])
def test_attention_is_close_on_the_whole(attending, name, dim, window):
    it, q, shape, expected = long_contexts(KV_FORMATS[name], dim, window)
    error = attending.attention(q, it.cache, it.batch, shape) - expected
    assert error.norm() <= ON_THE_WHOLE[rounded_bits(attending, it.cache.format, dim)] * expected.norm()


@pytest.mark.parametrize("name", ["fp16", "int8", "int4"])
def test_the_parts_of_a_long_context_may_be_different_threads(name):
    it, q, shape, _ = long_contexts(KV_FORMATS[name], 64, None)
    one, three = (select_ops("cpu", threads=threads).attention(q, it.cache, it.batch, shape) for threads in (1, 3))
    assert torch.equal(one, three)


@pytest.mark.parametrize("name", OF_4_BIT_KEYS)
@pytest.mark.parametrize("dim", [64, 128])
def test_attention_to_4_bit_keys_is_finer_where_8_bits_hold_the_queries(attending, name, dim):
    """What else could be wrong has no rounding of queries, or of the weights of 4-bit values, to hide behind."""
    fmt = KVFormat("k4v16", KV_FORMATS[name].key, HALVES, "", KV_FORMATS[name].sinks)
    it, q, shape, _ = long_contexts(fmt, dim, None)
    q = held_in_8_bits(it.cache, q)
    expected = attended(it, q, shape)
    error = attending.attention(q, it.cache, it.batch, shape) - expected
    assert error.norm() <= ON_THE_WHOLE[15] * expected.norm()


def held_in_8_bits(cache: KVLayer, q: Tensor) -> Tensor:
    """Queries that are integers of up to 127, times a power of two, where they meet the cache's codes."""
    codes = (40 * q).round().clamp(-127, 127)
    codes[..., ::16] = 127  # so there is one in each group of the codes
    met = codes * 2.0 ** -torch.arange(5.0, 5 + q.shape[1]).unsqueeze(1)
    codec, balance = cache.format.key, cache.plan.key_stats.balance
    if not isinstance(codec, ShapedCodec):
        return met
    assert balance is not None
    return hadamard(met) * balance.repeat_interleave(q.shape[1] // len(balance), dim=0)


@pytest.mark.parametrize("name", OF_4_BIT_VALUES)
@pytest.mark.parametrize(("dim", "window"), [(64, None), (128, 600)])
def test_attention_to_4_bit_values_is_exact_where_all_weigh_the_same(attending, name, dim, window):
    """Then weights need no rounding: all scores are 0, and all vectors have the same scales. They are the largest, and
    so are some codes, but for those of sinks, which are no codes.
    """
    it = scene_of(KV_FORMATS[name], 2, dim, 32, LONG, seed=1)
    for plane, data in it.cache.planes.items():
        if plane == "value.words":
            data.fill_(int(data.flatten()[7]))
        elif plane.startswith("value.") and plane != "value.codes":
            data.copy_(data.flatten(0, -2)[7].expand_as(data))
        elif plane == "value.codes" and not it.cache.format.sinks:
            data[..., :2], data[..., 2:4] = 255, 0
    for row, context in enumerate(map(len, (x[0] for x in it.values))):
        it.values[row].copy_(it.cache.read("value", it.batch.block_tables[row])[:, :context])
    q = torch.zeros(it.tokens, 4, dim)
    shape = AttentionShape(4, 2, dim, 0.125, window)
    expected = attended(it, q, shape)
    error = attending.attention(q, it.cache, it.batch, shape) - expected
    assert error.norm() <= 2 * ON_THE_WHOLE[24] * expected.norm()


@pytest.mark.parametrize("dim", [64, 128])
def test_small_weights_are_not_lost_beside_a_large_one(attending, dim):
    """Each 64th token outweighs the others 500 times; a fraction of a rounding's step each, they are an eighth."""
    it = scene_of(KVFormat("k16v4", HALVES, AffineCodec(4), ""), 1, dim, 64, [(639, 1)], seed=1)
    positions, wanted = torch.arange(640), torch.zeros(2, 1, 640, dim)
    wanted[0, :, ::64, 0] = torch.tensor(500.0).log()
    wanted[1] = torch.arange(dim) % 16  # 4 bits hold these
    wanted[1, :, ::64] = torch.arange(5, dim + 5) % 16
    slots = it.batch.block_tables[0, positions // 64] * 64 + positions % 64
    it.cache.write(*wanted, slots, positions)
    q = torch.zeros(1, 1, dim)
    q[..., 0] = 1
    found = attending.attention(q, it.cache, it.batch, AttentionShape(1, 1, dim, 1.0))
    expected = (500 * wanted[1, 0, 0] + 63 * wanted[1, 0, 1]) / (500 + 63)
    assert (found[0, 0] - expected).abs().max() <= 0.2
    assert (expected - wanted[1, 0, 0]).abs().min() > 0.5, "losing them would show"


@pytest.mark.parametrize("name", OF_4_BIT_VALUES)
@pytest.mark.parametrize(("new", "of_codes"), [(1, False), (1, True), (40, False), (40, True)])
@pytest.mark.parametrize("first", [True, False])
def test_weights_too_small_for_a_unit_leave_no_trace(attending, name, new, of_codes, first):
    """Beside one token, all weigh e^-75 to e^-85: units of their rounded weights are flushed to 0, or nearly."""
    fmt = KVFormat("small", AffineCodec(4) if of_codes else HALVES, KV_FORMATS[name].value, "")
    it = scene_of(fmt, 1, 64, 64, [(640 - new, new)], seed=1)
    positions, wanted, one = torch.arange(640), 0.01 * random(2, 2, 1, 640, 64), 0 if first else 600
    wanted[0] = 0
    wanted[0, 0, :, 0] = -torch.linspace(75, 85, 640)
    wanted[0, 0, one] = 0
    slots = it.batch.block_tables[0, positions // 64] * 64 + positions % 64
    it.cache.write(*wanted, slots, positions)
    q = torch.zeros(new, 1, 64)
    q[..., 0] = 1
    found = attending.attention(q, it.cache, it.batch, AttentionShape(1, 1, 64, 1.0))
    expected = it.cache.read("value", it.batch.block_tables[0])[0, one]
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()
