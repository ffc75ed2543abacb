"""Attention of many tokens at once, whose tiles begin, end and are cut everywhere."""

from __future__ import annotations

from functools import cache

import pytest
from torch import Tensor

from kvant.formats.kv import KV_FORMATS, KVFormat
from kvant.formats.kv_codecs import AffineCodec, GroupedCodec, ShapedCodec
from kvant.kernels.ops import AttentionShape
from tests.kernels.scenes import Scene, attended, random, scene_of
from tests.kernels.test_long_contexts import OF_4_BIT_KEYS, held_in_8_bits
from tests.kernels.tolerances import ON_THE_WHOLE, code_bits, rounded_bits_of_prompts

PROMPTS = [(0, 70), (61, 35), (3, 130), (200, 33)]
_FOUR_GROUPS = ShapedCodec(GroupedCodec(4))
FORMATS = {
    **{name: fmt for name, fmt in KV_FORMATS.items() if code_bits(fmt.value) == 4},
    "four_groups": KVFormat("four_groups", _FOUR_GROUPS, _FOUR_GROUPS, "", 4),
}
# Head size, query heads a KV head, block size, window, soft cap.
CASES = [
    (64, 3, 64, None, None),
    (64, 7, 8, 50, None),
    (128, 1, 16, None, 20.0),
    (96, 5, 32, 7, None),
    (32, 2, 8, 90, 5.0),
    (256, 4, 64, 100, None),
    (64, 20, 16, 100, None),
    (64, 96, 8, 20, None),
]


@cache
def prompts(name: str, case: tuple[int, int, int, int | None, float | None]) -> tuple[Scene, Tensor, AttentionShape]:
    """A scene, queries, and how they attend."""
    dim, ratio, block_size, window, softcap = case
    it = scene_of(FORMATS[name], 2, dim, block_size, PROMPTS, seed=1)
    return it, random(2, it.tokens, 2 * ratio, dim), AttentionShape(2 * ratio, 2, dim, 1 / dim**0.5, window, softcap)


@cache
def answers(name: str, case: tuple[int, int, int, int | None, float | None]) -> Tensor:
    it, q, shape = prompts(name, case)
    return attended(it, q, shape)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_attention_is_close_in_every_row(attending, name, case):
    (it, q, shape), expected = prompts(name, case), answers(name, case)
    error = attending.attention(q, it.cache, it.batch, shape) - expected
    limit = ON_THE_WHOLE[rounded_bits_of_prompts(attending, it.cache.format, shape.head_dim)]
    assert error.norm() <= limit * expected.norm()
    assert (error.norm(dim=-1) <= 3 * limit * expected.norm(dim=-1)).all()


@pytest.mark.parametrize("name", [*OF_4_BIT_KEYS, "four_groups"])
@pytest.mark.parametrize("case", CASES)
def test_4_bit_keys_are_met_finely_where_8_bits_hold_the_queries(attending, name, case):
    """Nor are weights rounded where all elements of a value are the same: it has no codes, but a zero point."""
    dim, ratio, block_size, window, softcap = case
    known = FORMATS[name]
    it = scene_of(KVFormat("k4v4", known.key, AffineCodec(4), "", known.sinks), 2, dim, block_size, PROMPTS, seed=1)
    affine = it.cache.planes["value.affine"]
    affine[..., 0] = 0
    affine[..., 1] = random(3, *affine.shape[:-1])
    for row, context in enumerate(it.batch.context_lens):
        it.values[row].copy_(it.cache.read("value", it.batch.block_tables[row])[:, :context])
    q = held_in_8_bits(it.cache, random(2, it.tokens, 2 * ratio, dim))
    shape = AttentionShape(2 * ratio, 2, dim, 1 / dim**0.5, window, softcap)
    expected = attended(it, q, shape)
    error = attending.attention(q, it.cache, it.batch, shape) - expected
    assert error.norm() <= ON_THE_WHOLE[15] * expected.norm()
    assert error.norm(dim=-1).max() <= 5 * ON_THE_WHOLE[15] * expected.norm(dim=-1).mean()
