"""Keys and values written where the parity test does not look: other head sizes, views of a projection, marks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kvant.formats.kv import KV_FORMATS
from kvant.kernels.reference import rotate
from kvant.kernels.triton.kv_write import rope_write_kv
from tests.formats.oracle import assert_encodes
from tests.formats.stats import layer_plan_of
from tests.kernels.scenes import Scene, scene, step_kv, step_planes

# Sinks, their neighbours, and tokens of later tiles of the centre, also far into a text.
LENGTHS = [(0, 6), (3, 2), (126, 4), (700, 1)]


def scene_of(name: str, dim: int, lengths: list[tuple[int, int]] = LENGTHS) -> Scene:
    return scene(layer_plan_of(KV_FORMATS[name], 2, dim, seed=1), 2, dim, 16, lengths, seed=2)


def projected(tokens: int, dim: int, heads: int = 3) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as views of one projection."""
    qkv = torch.randn(tokens, heads + 4, dim, generator=torch.Generator().manual_seed(dim))
    return qkv.split([heads, 2, 2], dim=1)


@pytest.mark.parametrize("dim", [96, 128, 256])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "k8v4", "int4_plain", "int8_pertoken", "fp8_e4m3"])
def test_vectors_are_stored_in_their_format(name, dim):
    it = scene_of(name, dim)
    q, k, v = projected(it.tokens, dim)
    angles = it.batch.positions.unsqueeze(1) * 0.7 ** torch.arange(dim // 2)
    rotary = angles.cos(), angles.sin()
    torch.testing.assert_close(rope_write_kv(q, k, v, rotary, it.cache, it.batch), rotate(q, *rotary))
    plan, sink = it.cache.plan, it.batch.positions < it.cache.format.sinks
    written, held = (rotate(k, *rotary).transpose(0, 1), v.transpose(0, 1)), step_kv(it, it.cache)
    for side, codec, stats, x, found in zip(
        ("key", "value"), (plan.format.key, plan.format.value), (plan.key_stats, plan.value_stats), written, held,
        strict=True,
    ):  # fmt: skip
        positions = it.batch.positions[~sink]
        assert_encodes(codec, step_planes(it, side), x[:, ~sink], positions, stats, 1e-6 * x[:, ~sink].abs().amax())
        torch.testing.assert_close(found[:, sink], x[:, sink].half().float(), atol=1e-5, rtol=2.0**-10)
    assert not it.batch.not_finite.any()


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_tokens_that_are_not_finite_are_marked(name, bad):
    it = scene_of(name, 32)
    q, k, v = (x.clone() for x in projected(it.tokens, 32))
    k[2, 1, 7], v[8, 0, 31], q[5] = bad, bad, bad
    before = {name: plane.clone() for name, plane in it.cache.planes.items()}
    rope_write_kv(q, k, v, None, it.cache, it.batch)
    assert it.batch.not_finite.nonzero().flatten().tolist() == [2, 8]
    others = torch.ones(len(next(iter(before.values()))), 16, dtype=torch.bool).index_put_(
        (it.batch.slots // 16, it.batch.slots % 16), torch.tensor(False)
    )
    others[it.batch.block_tables[:, 0]] = False  # where sinks are
    for name, plane in it.cache.planes.items():
        assert torch.equal(plane.transpose(1, 2)[others], before[name].transpose(1, 2)[others])


def test_nothing_is_written_for_no_tokens():
    it = scene_of("int4", 64)
    q, k, v = (x[:0] for x in projected(1, 64))
    assert rope_write_kv(q, k, v, None, it.cache, it.batch).shape == (0, 3, 64)
