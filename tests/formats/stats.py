"""Constants such as a model could have, made up: every format can be tested with what it works with."""

from __future__ import annotations

import torch
from torch import Tensor

from kvant.formats.kv import KVFormat, KVPlan, LayerPlan
from kvant.formats.kv_codecs import FloatCodec, ShapedCodec
from kvant.formats.kv_stats import Centre, LayerStats, turn
from kvant.models.spec import RopeSpec
from kvant.quantize.kv_constants import frequencies, key_shape, layer_plan
from kvant.quantize.kv_statistics import LayerStatistics

TOKENS = 256  # of the made-up text


def rope(rotated: int) -> RopeSpec | None:
    """Of so many first elements of a head: some pairs turn fast, some slowly, also over the contexts of tests."""
    return RopeSpec(dim=rotated, theta=500.0) if rotated else None


def layer_statistics(kv_heads: int, head_dim: int, seed: int, turning: RopeSpec | None) -> LayerStatistics:
    """Of keys that have much in common, most of it in few elements, and of queries that lie in few directions."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(kv_heads, *shape, generator=generator)

    spread, mean = random(head_dim).mul(0.6).exp(), random(head_dim) * random(head_dim).exp()
    directions = random(head_dim, head_dim) * random(1, head_dim).exp()
    moments = mean, spread.square(), directions @ directions.mT / head_dim
    positions = torch.arange(TOKENS)
    keys = turn(mean.unsqueeze(1) + spread.unsqueeze(1) * random(TOKENS, head_dim), positions, frequencies(turning))
    shaped = ShapedCodec(FloatCodec(torch.float32)).shaped(keys, positions, key_shape(*moments, turning))
    values = random(TOKENS, head_dim) * random(1, 1).mul(0.3).exp()
    key_range, shaped_range, value_range = (x.abs().amax((1, 2)) for x in (keys, shaped, values))
    return LayerStatistics(*moments, key_range=key_range, value_range=value_range, shaped_key_range=shaped_range)


def layer_plan_of(fmt: KVFormat, kv_heads: int, head_dim: int, seed: int = 0, rotated: int | None = None) -> LayerPlan:
    """A layer in this format with its constants; its keys turn in their first `rotated` elements, or in all."""
    turning = rope(head_dim if rotated is None else rotated)
    return layer_plan(fmt, layer_statistics(kv_heads, head_dim, seed, turning), turning)


def plan_of(fmt: KVFormat, num_layers: int, kv_heads: int, head_dim: int, seed: int = 0) -> KVPlan:
    """The format in every layer, each with constants of its own."""
    layers = (layer_plan_of(fmt, kv_heads, head_dim, seed + layer) for layer in range(num_layers))
    return KVPlan(fmt.name, tuple(layers))


def of_head(stats: LayerStats, head: int) -> LayerStats:
    """The constants of one KV head alone."""
    centre, one = stats.centre, slice(head, head + 1)
    return LayerStats(
        centre=None if centre is None else Centre(centre.coefficients[one], centre.frequencies),
        balance=None if stats.balance is None else stats.balance[one],
        feedback=None if stats.feedback is None else stats.feedback[one],
        scale=None if stats.scale is None else stats.scale[one],
    )
