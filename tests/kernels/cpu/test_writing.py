"""What native backends write does not depend on what is written beside it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kvant.errors import NotFiniteError
from kvant.formats.kv import KV_FORMATS, LayerPlan
from kvant.kernels.cpu.cache import is_native
from kvant.kernels.ops import AttentionBatch, Ops
from tests.formats.oracle import assert_encodes
from tests.formats.stats import layer_plan_of
from tests.kernels.cpu.conftest import MakeOps
from tests.kernels.scenes import Scene, scene, step_planes

TOKENS = 21
STEPS = ((0, 21), (0, 8, 16, 21), (0, 1, 4, 6, 13, 17, 21), tuple(range(22)))


def scene_of(name: str, heads: int, dim: int) -> Scene:
    """Without a centre, so that keys of 0 have a scale of 0."""
    plan: LayerPlan = layer_plan_of(KV_FORMATS[name], heads, dim, 1)
    plan = replace(plan, key_stats=replace(plan.key_stats, centre=None))
    return scene(plan, heads, dim, 32, [(9, TOKENS)], seed=2)


def vectors(heads: int, dim: int) -> Tensor:
    """Keys and values, some of them 0, some in the first half."""
    x = torch.randn(2, TOKENS, heads, dim, generator=torch.Generator().manual_seed(3))
    x[:, 2] = 0
    x[:, 11, 0] = 0
    x[:, 18, :, : dim // 2] = 0
    return x


def write(ops: Ops, it: Scene, x: Tensor, edges: tuple[int, ...]) -> dict[str, Tensor]:
    """The cache's bytes after steps that end at `edges`."""
    for plane in it.cache.planes.values():
        plane.view(torch.uint8).fill_(255)
    for start, stop in pairwise(edges):
        positions, slots = it.batch.positions[start:stop], it.batch.slots[start:stop]
        step = AttentionBatch(positions, slots, (0, stop - start), (9 + stop,), it.batch.block_tables)
        k, v = x[:, start:stop]
        ops.rope_write_kv(k, k, v, None, it.cache, step)
    return planes(it)


def planes(it: Scene) -> dict[str, Tensor]:
    return {name: plane.view(torch.uint8).clone() for name, plane in it.cache.planes.items()}


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (5, 24), (1, 256)])
def test_a_token_gets_the_same_bytes_in_steps_of_any_size(native: MakeOps, name: str, heads: int, dim: int) -> None:
    it, x = scene_of(name, heads, dim), vectors(heads, dim)
    if not is_native(it.cache, dim):
        pytest.skip("not a native format")
    whole = write(native(1), it, x, STEPS[0])
    for side, exact in zip(("key", "value"), x.transpose(1, 2), strict=True):
        codec, stats = getattr(it.cache.format, side), getattr(it.cache.plan, f"{side}_stats")
        assert_encodes(codec, step_planes(it, side), exact, it.batch.positions, stats)
    for edges in STEPS[1:]:
        found = write(native(2), it, x, edges)
        assert all(torch.equal(plane, whole[name]) for name, plane in found.items()), edges


@pytest.mark.parametrize("name", ["int4", "int8", "fp16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_of_what_is_not_finite_nothing_is_written(native: MakeOps, name: str, bad: float) -> None:
    """And the others are, to the bit."""
    it, x = scene_of(name, 3, 64), vectors(3, 64)
    whole, damaged = write(native(1), it, x, STEPS[0]), x.clone()
    damaged[0, 4, 1, 63] = damaged[1, 9, 0, 0] = bad
    with pytest.raises(NotFiniteError):
        write(native(1), it, damaged, STEPS[0])
    found = planes(it)
    for name, plane in found.items():
        lost, left = (4, 1) if name.startswith("key") else (9, 0), whole[name].clone()
        slot = int(it.batch.slots[lost[0]])
        left[slot // 32, lost[1], slot % 32] = 255
        assert torch.equal(plane, left), name
