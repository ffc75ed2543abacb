"""KV codecs: what is stored for any vector, what is read back, and that neighbours have no part in it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kvant.errors import ConfigError
from kvant.formats.kv import KV_FORMATS, KVFormat, LayerPlan
from kvant.formats.kv_codecs import (
    AffineCodec,
    FloatCodec,
    GroupedCodec,
    Planes,
    ShapedCodec,
    StaticCodec,
    SymmetricCodec,
    VectorCodec,
    hadamard,
)
from kvant.formats.kv_stats import NO_STATS, Centre, LayerStats, turn
from tests.formats.oracle import HALF_LIMIT, assert_encodes, shaped, sylvester
from tests.formats.stats import layer_plan_of, of_head
from tests.formats.vectors import FINITE, HEAD_DIMS, drawn_vectors, vectors

HALF_STEP, HALF_TINY = 2.0**-11, 2.0**-25  # float16's rounding, relative and absolute
AFFINE = [AffineCodec(8), AffineCodec(4)]
FLOATS = [FloatCodec(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
STATIC = [StaticCodec(dtype) for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)]
GROUPED = [GroupedCodec(groups) for groups in (1, 2, 4)]
UNMEASURED = [*AFFINE, *GROUPED, SymmetricCodec(), *FLOATS]
INNER = [*AFFINE, GroupedCodec(2), SymmetricCodec(), *STATIC, FloatCodec(torch.float16)]
SHAPED = [ShapedCodec(inner) for inner in INNER]
SIDES = [(name, side) for name in KV_FORMATS for side in ("key", "value")]
POSITIONS = st.integers(0, 40_000)
# Sums of elements that are as large as float32 has them would be infinite.
SUMMABLE = drawn_vectors((8, 16)).map(lambda x: x.clamp(-1e30, 1e30))
SOME = settings(max_examples=30)


def round_trip(codec: VectorCodec, x: Tensor, stats: LayerStats = NO_STATS) -> Tensor:
    positions = torch.arange(x.shape[1])
    return codec.decode(codec.encode(x, positions, stats), positions, stats)


def side_of(plan: LayerPlan, side: str) -> tuple[VectorCodec, LayerStats]:
    if side == "key":
        return plan.format.key, plan.key_stats
    return plan.format.value, plan.value_stats


def constants(x: Tensor, seed: int, still: int = 1, **without: None) -> LayerStats:
    """All that a layer with such vectors can have, less what is left out; one part in `still` of a key turns."""
    heads, dim = x.shape[0], x.shape[2]
    measured = layer_plan_of(KV_FORMATS["int4"], heads, dim, seed, rotated=dim // still // 2 * 2).key_stats
    scale = layer_plan_of(KV_FORMATS["int8_pertensor_perhead"], heads, dim, seed).key_stats.scale
    return LayerStats(**({**vars(measured), "scale": scale} | without))


@pytest.mark.parametrize("codec", UNMEASURED, ids=str)
@given(x=st.one_of(drawn_vectors((8, 16)), vectors()), data=st.data())
@SOME
def test_any_finite_vector_is_stored_as_well_as_its_codes_allow(codec, x, data):
    positions = torch.tensor(data.draw(st.lists(POSITIONS, min_size=x.shape[1], max_size=x.shape[1])))
    planes = codec.encode(x, positions, NO_STATS)
    assert_encodes(codec, planes, x, positions, NO_STATS)
    assert codec.decode(planes, positions, NO_STATS).isfinite().all()


@pytest.mark.parametrize("codec", STATIC, ids=str)
@given(x=st.one_of(drawn_vectors(), vectors()), data=st.data())
@SOME
def test_a_static_codec_rounds_to_steps_of_its_scale_and_saturates(codec, x, data):
    scale = torch.tensor([2.0 ** data.draw(st.floats(-20, 6)) for _ in x])
    found = round_trip(codec, x, LayerStats(scale=scale)).double()
    step = scale.double().view(-1, 1, 1)
    expected = x.double().clamp(-codec.largest * step, codec.largest * step)
    bits = {torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}.get(codec.dtype)
    bound = step / 2 if bits is None else expected.abs() * 2.0 ** (-bits - 1) + step * 2.0**-9 / 2
    assert ((found - expected).abs() <= bound * 1.0001 + expected.abs() * 1e-6).all()
    beyond = x.double().abs() >= codec.largest * step
    assert ((found - expected).abs() <= expected.abs() * 1e-6)[beyond].all()


@pytest.mark.parametrize("codec", SHAPED, ids=str)
@given(x=st.one_of(SUMMABLE, vectors()), data=st.data())
@SOME
def test_a_vector_is_shaped_and_then_stored_as_well_as_codes_allow(codec, x, data):
    stats = constants(x, data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2)), feedback=None)
    left_out = data.draw(st.sets(st.sampled_from(("centre", "balance"))))
    stats = LayerStats(**(vars(stats) | dict.fromkeys(left_out)))
    positions = torch.tensor(data.draw(st.lists(POSITIONS, min_size=x.shape[1], max_size=x.shape[1])))
    planes = codec.encode(x, positions, stats)
    assert_encodes(codec, planes, x, positions, stats)
    assert_undone(codec, planes, positions, stats)


def assert_undone(codec: ShapedCodec, planes: Planes, positions: Tensor, stats: LayerStats) -> None:
    """Shaped again, what was decoded is what the codec within decodes."""
    decoded, within = (c.decode(planes, positions, stats).double() for c in (codec, codec.inner))
    again, slack = shaped(decoded, positions, stats, slack=1e-6 * decoded.abs())
    assert ((again - within).abs() <= slack + 1e-6 * within.abs().sum(-1, keepdim=True)).all()


@pytest.mark.parametrize("dim", [16, 64, 80, 256])
@pytest.mark.parametrize("codec", GROUPED[:2], ids=str)
@given(data=st.data())
@settings(max_examples=8)
def test_with_feedback_each_code_is_half_a_step_off_its_own_aim(codec, dim, data):
    """And the first element, which nothing was passed on to, is half a step off itself."""
    x = data.draw(vectors((dim,), largest=12))
    stats = LayerStats(feedback=constants(x, data.draw(st.integers(0, 3))).feedback)
    planes = codec.encode(x, torch.arange(x.shape[1]), stats)
    assert_encodes(codec, planes, x, torch.arange(x.shape[1]), stats)
    first = codec.decode(planes, torch.arange(x.shape[1]), stats)[..., 0]
    nearest = round_trip(codec, x)[..., 0]
    assert torch.equal(first, nearest)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_feedback_keeps_more_of_what_queries_see(dim, groups):
    """The mean of (q^T e)^2 over queries, against codes that are rounded to the nearest: what feedback is for."""
    generator = torch.Generator().manual_seed(dim)
    x = torch.randn(1, 200, dim, generator=generator)
    directions = torch.randn(dim, dim, generator=generator) * torch.randn(dim, generator=generator).exp()
    moment = (directions @ directions.T / dim).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(moment + 0.01 * moment.trace() / dim * torch.eye(dim)), upper=True)
    feedback = (factor / factor.diagonal().unsqueeze(1)).triu(1).float().unsqueeze(0)
    seen = []
    for stats in (NO_STATS, LayerStats(feedback=feedback)):
        error = (round_trip(GroupedCodec(groups), x, stats) - x)[0].double()
        seen.append(((error @ moment) * error).sum(-1).mean())
    assert seen[1] < 0.7 * seen[0]


@given(x=vectors(largest=12), data=st.data())
@SOME
def test_shaping_and_feedback_go_together(x, data):
    codec = ShapedCodec(GroupedCodec(2))
    stats = constants(x, data.draw(st.integers(0, 3)), data.draw(st.integers(1, 2)))
    positions = torch.tensor(data.draw(st.lists(POSITIONS, min_size=x.shape[1], max_size=x.shape[1])))
    planes = codec.encode(x, positions, stats)
    assert_encodes(codec, planes, x, positions, stats)
    assert_undone(codec, planes, positions, stats)


@pytest.mark.parametrize("codec", GROUPED, ids=str)
@given(x=st.one_of(drawn_vectors((8, 16)), vectors()))
def test_grouped_codes_are_half_a_step_off_at_most(codec, x):
    """A step is a 15th of the group's span, or what an offset of 4 steps needs to reach its middle; and half is 9/16.

    Beside that, scales are rounded up to 5 bits of mantissa, and to multiples of 2^-19.
    """
    wide = x.double().unflatten(-1, (codec.groups, -1))
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    exact = torch.maximum((high - low) / 15, (high + low).abs() / 2 / 3.875)
    step = exact * (1 + 2.0**-5) * (1 + 2 * HALF_STEP) + 2.0**-19
    found = round_trip(codec, x).double().unflatten(-1, (codec.groups, -1))
    fits = (exact < 63000).expand_as(wide)
    assert ((found - wide).abs() <= (0.5 + 1 / 16 + 15 * HALF_STEP) * step)[fits].all()
    assert found.isfinite().all()
    assert (found.abs() <= wide.abs().amax(-1, keepdim=True) + step)[~fits].all()


@given(
    codes=st.lists(st.integers(0, 15), min_size=8, max_size=8), eighths=st.integers(-32, 31),
    exponent=st.integers(0, 29), mantissa=st.integers(0, 31),
)  # fmt: skip
def test_any_word_means_a_scale_and_an_offset(codes, eighths, exponent, mantissa):
    packed = torch.tensor([low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)])
    word = (exponent << 5 | mantissa) << 6 | (eighths + 32)
    planes = {
        "codes": packed.to(torch.uint8).view(1, 1, 4),
        "words": torch.tensor([[[word, 0]]]).to(torch.int16),
    }
    scale = (1 + mantissa / 32) * 2.0 ** (exponent - 15) if exponent else mantissa * 2.0**-19
    expected = [(code - 7.5 - eighths / 8) * scale for code in codes[:4]] + [0.0] * 4
    assert GroupedCodec(2).decode(planes, torch.zeros(1), NO_STATS).flatten().tolist() == expected


@pytest.mark.parametrize(("dim", "groups"), [(20, 4), (2, 2), (7, 1)])
def test_vectors_that_do_not_part_into_groups_are_refused(dim, groups):
    with pytest.raises(ConfigError, match=f"in {groups} groups need a head_dim that {2 * groups} divides"):
        GroupedCodec(groups).planes(dim)


@pytest.mark.parametrize("codec", AFFINE, ids=str)
@given(x=st.one_of(drawn_vectors(), vectors()))
def test_affine_codes_are_half_a_step_off_at_most(codec, x):
    """Beside that half step only the float16 rounding of scale and zero, and saturation at float16's limits."""
    levels = 2**codec.bits - 1
    wide = x.double()
    zero = wide.amin(-1, keepdim=True).clamp(-HALF_LIMIT, HALF_LIMIT)
    span = (wide.amax(-1, keepdim=True) - zero).clamp(0, levels * HALF_LIMIT)
    saturated = wide.clamp(zero, zero + span)
    rounding = 1.2 * HALF_STEP * (zero.abs() + span) + 1.2 * levels * HALF_TINY
    bound = span / levels * 0.5001 + rounding + 1e-6 * saturated.abs()
    decoded = round_trip(codec, x)
    assert decoded.dtype == torch.float32
    assert ((decoded.double() - saturated).abs() <= bound).all()


@given(x=st.one_of(drawn_vectors(), vectors()))
def test_symmetric_codes_are_half_a_step_off_at_most(x):
    saturated = x.double().clamp(-127 * HALF_LIMIT, 127 * HALF_LIMIT)
    largest = saturated.abs().amax(-1, keepdim=True)
    bound = largest / 127 * 0.5001 + 1.2 * HALF_STEP * largest + 127 * HALF_TINY
    assert ((round_trip(SymmetricCodec(), x).double() - saturated).abs() <= bound).all()


@pytest.mark.parametrize("codec", AFFINE, ids=str)
@given(value=st.floats(width=16, allow_nan=False, allow_infinity=False), dim=st.sampled_from((2, 64)))
def test_a_constant_vector_of_a_float16_value_is_exact(codec, value, dim):
    x = torch.full((1, 1, dim), value)
    assert torch.equal(round_trip(codec, x), x)
    assert not codec.encode(x, torch.zeros(1), NO_STATS)["codes"].any()


@given(x=st.one_of(drawn_vectors(), vectors()))
def test_float32_is_exact(x):
    assert torch.equal(round_trip(FloatCodec(torch.float32), x), x)


@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"), [(torch.float16, HALF_STEP, HALF_TINY), (torch.bfloat16, 2.0**-8, 2.0**-133)]
)
@given(x=st.one_of(drawn_vectors(), vectors()))
def test_16_bit_rounds_and_saturates(dtype, relative, absolute, x):
    limit = torch.finfo(dtype).max
    expected = x.double().clamp(-limit, limit)
    decoded = round_trip(FloatCodec(dtype), x)
    assert decoded.isfinite().all()
    assert ((decoded.double() - expected).abs() <= expected.abs() * relative + absolute).all()


def test_two_4_bit_codes_share_a_byte_the_even_element_below():
    x = torch.arange(16).float().view(1, 1, 16)  # scale 1, zero 0: each element is its own code
    planes = AffineCodec(4).encode(x, torch.zeros(1), NO_STATS)
    assert planes["codes"].flatten().tolist() == [low | (low + 1) << 4 for low in range(0, 16, 2)]
    assert planes["affine"].tolist() == [[[1.0, 0.0]]]


@given(codes=st.lists(st.integers(0, 15), min_size=8, max_size=8), scale=st.integers(-8, 4), zero=st.integers(-64, 64))
def test_any_4_bit_codes_mean_code_times_scale_plus_zero(codes, scale, zero):
    packed = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    affine = torch.tensor([2.0**scale, zero / 4]).half()
    planes = {"codes": torch.tensor(packed, dtype=torch.uint8).view(1, 1, 4), "affine": affine.view(1, 1, 2)}
    expected = [code * 2.0**scale + zero / 4 for code in codes]
    assert AffineCodec(4).decode(planes, torch.zeros(1), NO_STATS).flatten().tolist() == expected


@given(codes=st.lists(st.integers(0, 255), min_size=6, max_size=6))
def test_8_bit_codes_lie_one_a_byte(codes):
    codes = [0, 255, *codes]
    planes = AffineCodec(8).encode(torch.tensor([[codes]]).float(), torch.zeros(1), NO_STATS)
    assert planes["codes"].flatten().tolist() == codes


@pytest.mark.parametrize("codec", STATIC, ids=str)
def test_a_static_codec_without_scales_says_where_they_come_from(codec):
    x, positions = torch.ones(1, 1, 8), torch.zeros(1)
    planes = codec.encode(x, positions, LayerStats(scale=torch.ones(1)))
    for attempt in (lambda: codec.encode(x, positions, NO_STATS), lambda: codec.decode(planes, positions, NO_STATS)):
        with pytest.raises(ConfigError, match=r"needs scales; .*kvant calibrate MODEL --kv.*quantization_param_path"):
            attempt()


def same(first: Planes, second: Planes) -> bool:
    """Bit for bit."""
    return all(
        torch.equal(first[name].contiguous().view(torch.uint8), second[name].contiguous().view(torch.uint8))
        for name in first
    )


def part(planes: Planes, heads: slice, tokens: Tensor) -> Planes:
    return {name: plane[heads][:, tokens] for name, plane in planes.items()}


@pytest.mark.parametrize(("name", "side"), SIDES)
@given(x=st.one_of(SUMMABLE, vectors((24, 64, 80, 128), max_tokens=9)), data=st.data())
@settings(max_examples=20)
def test_what_is_stored_for_a_token_depends_on_that_token_alone(name, side, x, data):
    """Bit for bit, with the layer's constants, among any others and in any order; and so what is read back."""
    heads, count, dim = x.shape
    codec, stats = side_of(layer_plan_of(KV_FORMATS[name], heads, dim, data.draw(st.integers(0, 3))), side)
    positions = torch.tensor(data.draw(st.lists(POSITIONS, min_size=count, max_size=count)))
    together = codec.encode(x, positions, stats)
    read = codec.decode(together, positions, stats)
    some = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True)))
    every = slice(None)
    assert same(codec.encode(x[:, some], positions[some], stats), part(together, every, some))
    assert_same_bits(codec.decode(part(together, every, some), positions[some], stats), read[:, some])
    for head in range(heads):
        own, alone, one = of_head(stats, head), some[:1], slice(head, head + 1)
        assert same(codec.encode(x[one, alone], positions[alone], own), part(together, one, alone))
        assert_same_bits(codec.decode(part(together, one, alone), positions[alone], own), read[one, alone])


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))


@pytest.mark.parametrize(("name", "side"), SIDES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_a_long_prompt_is_stored_as_its_tokens_one_by_one(name, side, dim):
    """Libraries of matrix products choose another way for many rows."""
    codec, stats = side_of(layer_plan_of(KV_FORMATS[name], 2, dim), side)
    x, positions = torch.randn(2, 517, dim, generator=torch.Generator().manual_seed(dim)), torch.arange(517)
    together = codec.encode(x, positions, stats)
    read = codec.decode(together, positions, stats)
    for start, stop in ((0, 1), (63, 64), (100, 103), (516, 517), (200, 330)):
        some = positions[start:stop]
        assert same(codec.encode(x[:, some], some, stats), part(together, slice(None), some))
        assert_same_bits(codec.decode(part(together, slice(None), some), some, stats), read[:, some])


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [8, 24, *HEAD_DIMS])
def test_codes_have_the_shapes_and_types_that_the_planes_declare(name, dtype, dim):
    plan = layer_plan_of(KV_FORMATS[name], 3, dim)
    x = torch.randn(3, 5, dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    for codec, stats in (side_of(plan, "key"), side_of(plan, "value")):
        stored = codec.encode(x, torch.arange(5), stats)
        assert {plane.name for plane in codec.planes(dim)} == stored.keys()
        for plane in codec.planes(dim):
            assert stored[plane.name].shape == (3, 5, *plane.shape)
            assert stored[plane.name].dtype == plane.dtype
            assert plane.bytes * 15 == stored[plane.name].nbytes
        assert codec.planes(dim)[0].bytes >= dim // 2, "too little room for a sink"
        decoded = codec.decode(stored, torch.arange(5), stats)
        assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)


# The error that a model feels, relative to the vectors: measured once, kept from growing.
LOSSES = {
    "fp32": 0.0, "fp16": 3e-4, "bf16": 2.5e-3, "int8": 0.006, "k8v4": 0.006, "int4": 0.11, "int8_plain": 0.006,
    "int4_plain": 0.11, "int8_pertoken": 0.007,
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_random_vectors_lose_little(name):
    fmt: KVFormat = KV_FORMATS[name]
    x = torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(0))
    assert (round_trip(fmt.key, x) - x).norm() / x.norm() <= LOSSES[name]


def test_what_keys_have_in_common_takes_no_codes_once_it_is_centred():
    """Keys that differ by 1 around a mean of 40, turned to their positions, in 4 bits."""
    turning, positions = torch.linspace(0.001, 0.03, 32), torch.arange(400)
    mean, noise = (torch.randn(1, n, 64, generator=torch.Generator().manual_seed(n)) for n in (1, 400))
    keys = turn(40 * mean, positions, turning) + noise
    centre = Centre.of_mean(40 * mean[:, 0], turning, order=4)
    losses = []
    for stats in (LayerStats(centre=centre), NO_STATS):
        codec = ShapedCodec(GroupedCodec(2))
        losses.append(
            (codec.decode(codec.encode(keys, positions, stats), positions, stats) - keys).square().mean().sqrt()
        )
    assert losses[0] < 0.12
    assert losses[1] > 20 * losses[0]


@given(x=vectors((1, 2, 6, 8, 20, *HEAD_DIMS), largest=60))
def test_hadamard_is_sylvesters_matrix_and_undoes_itself(x):
    found, matrix = hadamard(x), sylvester(x.shape[-1])
    slack = x.shape[-1] * 2.0**-24 * x.double().abs() @ matrix.abs() + 1e-37
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert ((found.double() - x.double() @ matrix).abs() <= slack).all()
    assert ((hadamard(found).double() - x.double()).abs() <= slack @ matrix.abs() * 2).all()
    size = x.shape[-1]
    assert torch.allclose(matrix @ matrix, torch.eye(size).double())
    assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_hadamard_spreads_one_large_element_over_its_block(dim):
    x = torch.zeros(1, dim)
    x[0, -1] = 1.0
    block = dim & -dim
    assert torch.allclose(hadamard(x)[0, -block:].abs(), torch.full((block,), block**-0.5))
    assert not hadamard(x)[0, :-block].any()


@given(value=FINITE.filter(lambda v: abs(v) <= 1e30), dim=st.sampled_from(HEAD_DIMS))
def test_rotated_constants_stay_finite(value, dim):
    """A constant vector is the worst of its size for a sum."""
    x = torch.full((1, 1, dim), value)
    assert round_trip(ShapedCodec(GroupedCodec(2)), x).isfinite().all()
