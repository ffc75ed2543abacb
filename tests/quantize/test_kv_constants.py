"""The constants of KV codecs, against what they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvant.formats.kv import KV_FORMATS, LayerPlan
from kvant.formats.kv_codecs import StaticCodec, hadamard
from kvant.formats.kv_stats import CENTRE_TILE, NO_STATS, LayerStats, turn
from kvant.models.rope import RotaryEmbedding, inverse_frequencies
from kvant.models.spec import RopeSpec
from kvant.quantize import kv_constants
from kvant.quantize.kv_constants import frequencies, key_centre, key_shape, layer_plan, static_scale, turned_moment
from kvant.quantize.kv_statistics import LayerStatistics

HEADS, DIM = 2, 32
YARN = RopeSpec(DIM, theta=1e6, kind="yarn", factor=4.0, original_length=4096, attention_factor=1.14)
ROPES = {
    "none": None,
    "default": RopeSpec(DIM, theta=1e6),
    "partial": RopeSpec(20, theta=1e6),
    "linear": RopeSpec(DIM, theta=1e4, kind="linear", factor=8.0),
    "llama3": RopeSpec(DIM, theta=5e5, kind="llama3", factor=8.0, original_length=8192),
    "yarn": YARN,
    "dynamic": RopeSpec(DIM, theta=1e4, kind="dynamic", factor=4.0, original_length=512),
    "qwen": RopeSpec(DIM, theta=1e4, kind="qwen", original_length=512),
    "longrope": RopeSpec(
        DIM,
        theta=1e4,
        kind="longrope",
        original_length=512,
        attention_factor=1.19,
        short_factors=tuple(1 + 0.1 * i for i in range(16)),
        long_factors=tuple(1.5**i for i in range(16)),
    ),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def statistics(**changes: Tensor) -> LayerStatistics:
    """Of keys that are mostly mean, and queries that are as large in every direction."""
    plain = {
        "key_mean": 5 * noise(HEADS, DIM),
        "key_variance": noise(HEADS, DIM, seed=1).square() + 0.1,
        "query_moment": torch.eye(DIM).expand(HEADS, DIM, DIM),
        "key_range": torch.tensor([12.0, 7.0]),
        "value_range": torch.tensor([2.0, 3.0]),
        "shaped_key_range": torch.tensor([4.0, 5.0]),
    }
    return LayerStatistics(**plain | changes)


def rotated(x: Tensor, rope: RopeSpec | None, positions: Tensor) -> Tensor:
    """What the model's RoPE makes of x [heads, head_dim] at these positions of a short prompt: [heads, tokens, ...]."""
    x = x.unsqueeze(1).expand(-1, len(positions), -1)
    if rope is None:
        return x
    cos, sin = RotaryEmbedding(rope)(positions, torch.full_like(positions, min(512, rope.original_length or 512)))
    half = cos.shape[1]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)
    return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :]], dim=-1)


# ---- the centre


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_the_centre_is_the_mean_key_as_the_model_turns_it(rope):
    """Where a pair turns by less than a quarter within a tile; one that turns ten times is left alone."""
    mean, positions = noise(HEADS, DIM), torch.tensor([0, 1, 63, 64, 100, 333, 511])
    centre, true = key_centre(mean, rope).at(positions), rotated(mean, rope, positions)
    half = len(frequencies(rope))
    angle = torch.zeros(DIM)
    angle[: 2 * half] = frequencies(rope).repeat(2) * CENTRE_TILE
    slow, fast = angle < 1.5, angle > 40
    assert slow.sum() >= 8
    torch.testing.assert_close(centre[..., slow], true[..., slow], rtol=0, atol=0.01)
    everywhere = key_centre(mean, rope).at(torch.arange(512))
    assert (everywhere[..., fast].square().mean(1) < 0.1 * mean[:, fast].square().view(HEADS, -1) + 0.02).all()


def test_the_factor_of_a_stretched_rope_is_in_the_centre():
    mean, positions = noise(HEADS, DIM), torch.arange(CENTRE_TILE)
    plain = key_centre(mean, replace(YARN, attention_factor=1.0)).at(positions)
    torch.testing.assert_close(key_centre(mean, YARN).at(positions), 1.14 * plain)


def test_the_factor_of_a_stretched_rope_is_for_what_turns():
    mean, positions = noise(HEADS, DIM), torch.arange(CENTRE_TILE)
    centre = key_centre(mean, replace(YARN, dim=20)).at(positions)
    torch.testing.assert_close(centre[..., 20:], mean[:, None, 20:].expand(-1, CENTRE_TILE, -1))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_pairs_that_turn_otherwise_in_longer_prompts_have_no_centre(kind):
    """Where such a pair's mean stands depends on the prompt: a wrong centre would be worse than none."""
    rope, mean, positions = ROPES[kind], noise(HEADS, DIM), torch.arange(CENTRE_TILE)
    longer = 4 * rope.original_length
    steady = torch.isclose(inverse_frequencies(rope, longer), frequencies(rope), rtol=1e-6, atol=0).repeat(2)
    assert not steady.all()
    within, beyond = (key_centre(mean, rope, longest).at(positions) for longest in (rope.original_length, longer))
    assert torch.equal(within, key_centre(mean, rope).at(positions))
    assert not beyond[..., : rope.dim][..., ~steady].any()
    torch.testing.assert_close(beyond[..., : rope.dim][..., steady], within[..., : rope.dim][..., steady])


def test_frequencies_are_those_within_the_original_length():
    short = ROPES["longrope"]
    plain = 1e4 ** (-torch.arange(0, DIM, 2) / DIM)
    torch.testing.assert_close(frequencies(short), plain / torch.tensor(short.short_factors))
    torch.testing.assert_close(frequencies(ROPES["dynamic"]), plain)
    assert frequencies(None).shape == (0,)


# ---- the moment of queries at all positions


@pytest.mark.parametrize("rope", [None, RopeSpec(8, theta=50.0), RopeSpec(12, theta=50.0), RopeSpec(2)], ids=str)
def test_the_turned_moment_is_the_mean_over_all_positions(monkeypatch, rope):
    contexts = (5, 12, 64)
    monkeypatch.setattr(kv_constants, "_CONTEXTS", contexts)
    factors = noise(HEADS, 12, 12)
    moment, turns = factors @ factors.mT, frequencies(rope)
    means = []
    for length in contexts:
        # The columns of a matrix E with E E^T = M, each turned to every position.
        columns = turn(factors.mT.unsqueeze(2), torch.arange(length), turns)
        means.append(torch.einsum("hcpi,hcpj->hij", columns, columns) / length)
    torch.testing.assert_close(turned_moment(moment, turns), torch.stack(means).mean(0), rtol=1e-4, atol=1e-4)


def test_without_rope_the_moment_stays_as_it_is():
    factors = noise(HEADS, DIM, DIM)
    moment = factors @ factors.mT
    torch.testing.assert_close(turned_moment(moment, torch.empty(0)), moment)


@pytest.mark.parametrize("rope", [RopeSpec(128, theta=1e6), RopeSpec(128, theta=1e4)], ids=["1e6", "1e4"])
def test_a_turned_moment_is_a_moment(rope):
    """Symmetric, without negative directions, and as large as before; slow pairs too."""
    factors = noise(1, 128, 3)
    moment = factors @ factors.mT
    turned = turned_moment(moment, frequencies(rope))
    torch.testing.assert_close(turned, turned.mT)
    assert torch.linalg.eigvalsh(turned).min() > -1e-4
    torch.testing.assert_close(turned.diagonal(dim1=-2, dim2=-1).sum(), moment.diagonal(dim1=-2, dim2=-1).sum())
    # The pair that turns most slowly has hardly moved, the fastest has been everywhere.
    slowest, fastest = torch.tensor([63, 127]), torch.tensor([0, 64])
    assert turned[0, fastest[0], fastest[1]].abs() < 0.01 * turned[0, fastest[0], fastest[0]]
    if rope.theta > 1e5:
        of_slowest = moment[0][slowest][:, slowest]
        torch.testing.assert_close(turned[0][slowest][:, slowest], of_slowest, rtol=0.02, atol=0.02)


# ---- the balance


def balance(rope: RopeSpec | None = None, **changes: Tensor) -> Tensor:
    layer = statistics(**changes)
    found = key_shape(layer.key_mean, layer.key_variance, layer.query_moment, rope).balance
    assert found is not None
    return found


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_the_balance_is_the_same_within_a_pair_and_1_on_average(rope):
    factors = noise(HEADS, DIM, DIM)
    found = balance(rope, query_moment=factors @ factors.mT)
    half = len(frequencies(rope))
    assert torch.equal(found[:, :half], found[:, half : 2 * half])
    torch.testing.assert_close(found.log().mean(-1), torch.zeros(HEADS), rtol=0, atol=1e-5)
    assert found.unique().numel() >= DIM


def test_larger_keys_are_made_smaller_and_those_of_larger_queries_larger():
    variance, moment = torch.ones(HEADS, DIM), torch.eye(DIM).repeat(HEADS, 1, 1)
    variance[:, 3], moment[:, 5, 5] = 100.0, 100.0
    found = balance(key_mean=torch.zeros(HEADS, DIM), key_variance=variance, query_moment=moment)
    assert (found[:, 3] < 0.5 * found[:, 0]).all()
    assert (found[:, 5] > 1.2 * found[:, 0]).all()


def test_a_mean_that_the_centre_follows_does_not_count_and_one_that_it_cannot_does():
    """All is mean: in the slowest pair the centre takes it off, in the fastest it stays in the keys."""
    rope, mean = RopeSpec(DIM, theta=1e6), torch.zeros(HEADS, DIM)
    mean[:, 0] = mean[:, 15] = 10.0
    found = balance(rope, key_mean=mean, key_variance=torch.ones(HEADS, DIM))
    assert (found[:, 0] < 0.7 * found[:, 8]).all()
    torch.testing.assert_close(found[:, 15], found[:, 8], rtol=0.01, atol=0)


def test_zeros_have_a_balance():
    nothing = torch.zeros(HEADS, DIM)
    found = balance(key_mean=nothing, key_variance=nothing, query_moment=torch.zeros(HEADS, DIM, DIM))
    torch.testing.assert_close(found, torch.ones(HEADS, DIM))
    some = torch.ones(HEADS, DIM)
    some[:, ::2] = 0
    found = balance(key_mean=nothing, key_variance=some)
    assert found.isfinite().all()
    assert (found > 0).all()


# ---- the feedback


def int4(rope: RopeSpec | None = None, **changes: Tensor) -> LayerPlan:
    return layer_plan(KV_FORMATS["int4"], statistics(**changes), rope)


def seen_error(plan: LayerPlan, stats: LayerStats, keys: Tensor, queries: Tensor, positions: Tensor) -> Tensor:
    """The mean square of q^T e over keys and queries [heads, n, head_dim], for each head."""
    codec = plan.format.key
    error = codec.decode(codec.encode(keys, positions, stats), positions, stats) - keys
    return (queries @ error.mT).square().mean((1, 2))


@pytest.mark.parametrize("rope", [None, RopeSpec(DIM, theta=1e6), RopeSpec(16, theta=1e6)], ids=["no", "full", "half"])
def test_feedback_saves_most_of_what_queries_would_see_of_the_rounding(rope):
    """Queries of few directions, as real ones are; from every position of the contexts."""
    directions = noise(HEADS, DIM, 4, seed=3)
    moment = directions @ directions.mT + 0.01 * torch.eye(DIM)
    plan = int4(rope, query_moment=moment, key_mean=torch.zeros(HEADS, DIM), key_variance=torch.ones(HEADS, DIM))
    positions = torch.arange(400)
    turns = frequencies(rope)
    queries = turn((directions @ noise(HEADS, 4, 400, seed=4)).mT, torch.arange(400) * 8, turns)
    keys = turn(noise(HEADS, 400, DIM, seed=5), positions, turns)
    without = seen_error(plan, replace(plan.key_stats, feedback=None), keys, queries, positions)
    with_it = seen_error(plan, plan.key_stats, keys, queries, positions)
    assert (with_it < (0.5 if rope is None else 0.9) * without).all()


def test_queries_that_look_everywhere_alike_give_no_feedback():
    plan = int4(query_moment=3 * torch.eye(DIM).expand(HEADS, DIM, DIM), key_variance=torch.ones(HEADS, DIM))
    feedback = plan.key_stats.feedback
    assert feedback is not None
    torch.testing.assert_close(feedback, torch.zeros(HEADS, DIM, DIM), rtol=0, atol=1e-4)


def test_each_element_makes_up_for_those_before_it_only():
    factors = noise(HEADS, DIM, DIM)
    feedback = int4(query_moment=factors @ factors.mT).key_stats.feedback
    assert feedback is not None
    assert feedback.shape == (HEADS, DIM, DIM)
    assert not feedback.tril().any()
    assert feedback[:, 0, 1:].abs().min() > 0


def test_the_last_but_one_element_leaves_the_last_what_is_best():
    """After the others, e^T M e has its minimum over the last error e_n at -M[n, n - 1] / M[n, n] e_(n - 1)."""
    factors = noise(HEADS, DIM, DIM)
    plan = int4(query_moment=factors @ factors.mT, key_variance=torch.ones(HEADS, DIM))
    shaped = factors / plan.key_stats.balance.unsqueeze(-1)  # columns of E with E E^T = M, as they meet balanced keys
    shaped = hadamard(shaped.mT).mT
    seen = shaped @ shaped.mT
    seen += 0.02 * seen.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1) * torch.eye(DIM)
    expected = -seen[:, -1, -2] / seen[:, -1, -1]
    torch.testing.assert_close(plan.key_stats.feedback[:, -2, -1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rope", [None, RopeSpec(DIM)], ids=["no", "rope"])
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_moments_without_full_rank_have_a_finite_feedback(rope, rank, size):
    factors = size * noise(HEADS, DIM, max(rank, 1)) * (rank > 0)
    plan = int4(rope, query_moment=factors @ factors.mT)
    assert plan.key_stats.feedback.isfinite().all()
    assert plan.key_stats.feedback.abs().max() < 1000
    if rank == 0:
        torch.testing.assert_close(plan.key_stats.feedback, torch.zeros(HEADS, DIM, DIM))


# ---- which constants a format gets


def test_every_format_gets_the_constants_that_its_codecs_want():
    wanted = {
        "int8": ({"centre", "balance"}, set()),
        "k8v4": ({"centre", "balance"}, set()),
        "int4": ({"centre", "balance", "feedback"}, set()),
        "int8_pertensor": ({"centre", "balance", "scale"}, {"scale"}),
        "int8_pertensor_perhead": ({"centre", "balance", "scale"}, {"scale"}),
        "fp8_e4m3": ({"centre", "balance", "scale"}, {"scale"}),
        "fp8_e5m2": ({"centre", "balance", "scale"}, {"scale"}),
    }
    for name, fmt in KV_FORMATS.items():
        plan = layer_plan(fmt, statistics(), ROPES["default"])
        found = tuple({key for key, value in vars(stats).items() if value is not None} for stats in _sides(plan))
        assert found == wanted.get(name, (set(), set())), name
        assert fmt.measured == (name in wanted), name
    assert layer_plan(KV_FORMATS["int8_plain"], statistics(), None) == LayerPlan(KV_FORMATS["int8_plain"])
    assert layer_plan(KV_FORMATS["int8"], statistics(), None).value_stats is NO_STATS


def _sides(plan: LayerPlan) -> tuple[LayerStats, LayerStats]:
    return plan.key_stats, plan.value_stats


@pytest.mark.parametrize(
    ("name", "keys", "values"),
    [
        ("int8_pertensor", [5 / 127, 5 / 127], [3 / 127, 3 / 127]),
        ("int8_pertensor_perhead", [4 / 127, 5 / 127], [2 / 127, 3 / 127]),
        ("fp8_e4m3", [5 / 448, 5 / 448], [3 / 448, 3 / 448]),
        ("fp8_e5m2", [5 / 57344, 5 / 57344], [3 / 57344, 3 / 57344]),
    ],
)
def test_static_codes_reach_the_largest_shaped_key_and_the_largest_value(name, keys, values):
    plan = layer_plan(KV_FORMATS[name], statistics(), None)
    torch.testing.assert_close(plan.key_stats.scale, torch.tensor(keys))
    torch.testing.assert_close(plan.value_stats.scale, torch.tensor(values))


def test_nothing_but_zeros_has_a_scale():
    scale = static_scale(StaticCodec(torch.int8, per_head=True), torch.tensor([0.0, 1.0]))
    assert (scale > 0).all()
    assert scale[1] == 1 / 127


@pytest.mark.parametrize("name", ["int8", "int4", "int8_pertensor", "fp8_e4m3"])
@pytest.mark.parametrize("rope", [None, ROPES["default"]], ids=["no", "rope"])
def test_keys_that_are_mostly_mean_keep_what_tells_them_apart(name, rope):
    """A hundred times as much mean as the rest; with nothing measured, it is what the steps are spent on."""
    mean, positions = 20 * noise(HEADS, DIM), torch.arange(300)
    if rope is not None:
        mean[:, :6] = mean[:, 16:22] = 0  # these turn too often
    own = noise(HEADS, 300, DIM, seed=8)
    keys = rotated(mean, rope, positions) + turn(own, positions, frequencies(rope))
    layer = statistics(key_mean=mean, key_variance=torch.ones(HEADS, DIM))
    shape = key_shape(layer.key_mean, layer.key_variance, layer.query_moment, rope)
    shaped = KV_FORMATS["int4"].key.shaped(keys, positions, shape)
    plan = layer_plan(KV_FORMATS[name], replace(layer, shaped_key_range=shaped.abs().amax((1, 2))), rope)
    plain = KV_FORMATS[f"{name[:4]}_plain" if name.startswith("int") else "int8_plain"]
    errors = []
    for codec, stats in ((plan.format.key, plan.key_stats), (plain.key, NO_STATS)):
        found = codec.decode(codec.encode(keys, positions, stats), positions, stats)
        errors.append(float((found - keys).square().mean()))
    assert errors[0] < {"int8": 1e-3, "int4": 0.03, "int8_pertensor": 1e-3, "fp8_e4m3": 2e-3}[name]
    assert errors[1] > 5 * errors[0]
