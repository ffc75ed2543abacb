"""From a model's statistics to the constants that KV codecs work with.

For int4 keys three things are chosen so that few bits cost little of what queries see, q^T k:

* the centre, what all keys have in common, is taken off (see `kvant.formats.kv_stats.Centre`);
* the balance d multiplies each RoPE pair of a key, and 1/d the query's: an error in a pair costs what its queries are
  large, and larger keys make larger errors everywhere once a rotation has spread them;
* the feedback: q^T e, with e the error of a key, has the mean square e^T M e, where M = E[q q^T]. Rounding to the
  nearest minimizes e^T e instead. M is far from a multiple of the identity, so elements are rounded one by one, and
  those that follow make up for what is known to be lost: GPTQ does so for weights (Frantar et al. 2023), and lattice
  decoding knows it as Babai's nearest plane (1986). The codes are as many, and decode as before.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvant.formats.kv import KVFormat, LayerPlan
from kvant.formats.kv_codecs import GroupedCodec, ShapedCodec, StaticCodec, VectorCodec, hadamard
from kvant.formats.kv_stats import CENTRE_TILE, NO_STATS, Centre, LayerStats
from kvant.models.rope import inverse_frequencies
from kvant.models.spec import RopeSpec
from kvant.quantize.kv_statistics import LayerStatistics

CENTRE_ORDER = 4
# The contexts, in tokens, over whose positions queries are averaged.
_CONTEXTS = (1024, 4096, 16384)
# Between (1/4, 1/4), best when rounding to the nearest, and (0, 1/2), best with perfect feedback.
_QUERY_POWER, _KEY_POWER = 0.12, 0.38
_DAMPING = 0.02  # of M's mean diagonal, added to it: queries of other texts differ
RULES = (CENTRE_ORDER, _QUERY_POWER, _KEY_POWER)  # what the range of shaped keys depends on


def layer_plan(fmt: KVFormat, layer: LayerStatistics, rope: RopeSpec | None, longest: int = 0) -> LayerPlan:
    """A layer's format with the constants that its codecs want, in a model made for contexts of `longest` tokens."""
    return LayerPlan(fmt, _key_stats(fmt.key, layer, rope, longest), _value_stats(fmt.value, layer))


def key_shape(
    mean: Tensor, variance: Tensor, query_moment: Tensor, rope: RopeSpec | None, longest: int = 0
) -> LayerStats:
    """Centre and balance of keys; arguments as in `LayerStatistics` and `key_centre`."""
    centre = key_centre(mean, rope, longest)
    power = _stretch(rope, mean.shape[-1]).square()
    queries = query_moment.diagonal(dim1=-2, dim2=-1) * power
    return LayerStats(centre, _balance(mean.square() * power, variance * power, queries, centre))


def key_centre(mean: Tensor, rope: RopeSpec | None, longest: int = 0) -> Centre:
    """The centre of keys whose mean before RoPE is [kv_heads, head_dim].

    Pairs whose frequency is another one in prompts of `longest` tokens have no centre: where such a pair's mean stands
    depends on the prompt, not on the position alone, and a wrong centre is worse than none. By default no prompt is
    longer than the original length.
    """
    known = mean * _stretch(rope, mean.shape[-1])
    if rope is not None:
        steady = torch.isclose(inverse_frequencies(rope, longest), frequencies(rope), rtol=1e-6, atol=0.0)
        known[..., : rope.dim] *= steady.repeat(2)
    return Centre.of_mean(known, frequencies(rope), CENTRE_ORDER)


def frequencies(rope: RopeSpec | None) -> Tensor:
    """Radians per position of each pair in prompts within the original length, [R / 2]; empty without RoPE."""
    return torch.empty(0) if rope is None else inverse_frequencies(rope, rope.original_length)


def _stretch(rope: RopeSpec | None, head_dim: int) -> Tensor:
    """What RoPE multiplies each element with beside turning it, [head_dim]."""
    stretch = torch.ones(head_dim)
    if rope is not None:
        stretch[: rope.dim] = rope.attention_factor
    return stretch


def _key_stats(codec: VectorCodec, layer: LayerStatistics, rope: RopeSpec | None, longest: int) -> LayerStats:
    if not isinstance(codec, ShapedCodec):
        return NO_STATS
    shape = key_shape(layer.key_mean, layer.key_variance, layer.query_moment, rope, longest)
    if isinstance(codec.inner, StaticCodec):
        return replace(shape, scale=static_scale(codec.inner, layer.shaped_key_range))
    if isinstance(codec.inner, GroupedCodec):  # 8-bit codes lose too little to make up for
        stretch = _stretch(rope, layer.key_mean.shape[-1])
        return replace(shape, feedback=_feedback(layer.query_moment * stretch * stretch.unsqueeze(1), shape))
    return shape


def _value_stats(codec: VectorCodec, layer: LayerStatistics) -> LayerStats:
    if not isinstance(codec, StaticCodec):
        return NO_STATS
    return LayerStats(scale=static_scale(codec, layer.value_range))


def static_scale(codec: StaticCodec, largest: Tensor) -> Tensor:
    """The step of each KV head, [kv_heads], so that codes reach these largest magnitudes."""
    reach = largest if codec.per_head else largest.max().expand_as(largest)
    return reach.clamp(min=1e-6) / codec.largest


def _balance(mean_power: Tensor, variance: Tensor, query_power: Tensor, centre: Centre) -> Tensor:
    """What to multiply keys with, [kv_heads, head_dim], the same within a pair; its geometric mean is 1.

    The square of the keys' mean, their variance and E[q^2] are as RoPE stretches them; the centre is that of the keys.
    """
    half = centre.frequencies.shape[0]
    # What the centre does not follow of the mean stays in the keys; the polynomials are orthonormal.
    followed = centre.coefficients.square().sum(1) / CENTRE_TILE
    left = (_by_pair(mean_power, half) - _by_pair(followed, half)).clamp(min=0)
    keys = _by_pair(variance, half) + left
    queries = _by_pair(query_power, half)
    raw = queries.clamp(min=1e-12) ** _QUERY_POWER / keys.clamp(min=1e-12) ** _KEY_POWER
    return raw / raw.log().mean(-1, keepdim=True).exp()


def _by_pair(x: Tensor, half: int) -> Tensor:
    """x [..., head_dim] averaged over the RoPE pairs (i, i + half); the elements that do not turn as they are."""
    mean = (x[..., :half] + x[..., half : 2 * half]) / 2
    return torch.cat([mean, mean, x[..., 2 * half :]], dim=-1)


def turned_moment(moment: Tensor, turns: Tensor) -> Tensor:
    """E[R_p q (R_p q)^T] over the positions p of contexts of several lengths, from E[q q^T] before RoPE.

    In the basis where R_p is diagonal, e^(i theta p), the mean over p multiplies each entry by the mean of
    e^(i (theta_a - theta_b) p), a geometric series.

    Args:
        moment: [kv_heads, head_dim, head_dim].
        turns: [R / 2], radians per position of the pairs (i, i + R / 2).
    """
    basis, theta = _turning_basis(turns.double(), moment.shape[-1])
    apart = theta.unsqueeze(1) - theta
    kept = torch.stack([_mean_phase(apart, length) for length in _CONTEXTS]).mean(0)
    turned = basis.mH @ (basis @ moment.to(basis.dtype) @ basis.mH * kept) @ basis
    real: Tensor = turned.real
    return real.float()


def _turning_basis(turns: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The unitary matrix, complex [head_dim, head_dim], that makes R_p diagonal, and its radians per position."""
    half, basis = len(turns), torch.eye(head_dim, dtype=torch.complex128)
    first = torch.arange(half)
    basis[first, first] = basis[first + half, first] = 0.5**0.5
    basis[first, first + half], basis[first + half, first + half] = 1j * 0.5**0.5, -1j * 0.5**0.5
    return basis, torch.cat([turns, -turns, turns.new_zeros(head_dim - 2 * half)])


def _mean_phase(angle: Tensor, length: int) -> Tensor:
    """The mean of e^(i angle p) over p = 0 .. length - 1."""
    whole = torch.polar(torch.ones_like(angle), angle)
    still = (1 - whole).abs() < 1e-9
    series = (1 - whole**length) / torch.where(still, 1.0, 1 - whole)
    return torch.where(still, 1.0, series / length)


def _feedback(query_moment: Tensor, shape: LayerStats) -> Tensor:
    """`LayerStats.feedback` for keys of this shape that queries meet whose moment before RoPE is given.

    With M = E[q' q'^T] of the queries that meet balanced and rotated keys, and U the upper Cholesky factor of M^-1, it
    is U[i, j] / U[i, i].
    """
    assert shape.centre is not None, "key_shape gives both"
    assert shape.balance is not None, "key_shape gives both"
    moment = turned_moment(query_moment, shape.centre.frequencies)
    seen = moment / shape.balance.unsqueeze(-1) / shape.balance.unsqueeze(-2)
    seen = hadamard(hadamard(seen.double()).mT)
    damping = _DAMPING * seen.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    seen = seen + damping[:, None, None] * torch.eye(seen.shape[-1], dtype=seen.dtype)
    factor = torch.linalg.cholesky(torch.linalg.inv(seen), upper=True)
    ratios: Tensor = factor / factor.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return ratios.triu(1).float()
