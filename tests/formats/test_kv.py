"""KV formats: how far decoded vectors may lie from what was stored, and what the bytes are."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from kvant.errors import ConfigError
from kvant.formats.kv import KV_FORMATS, KVLayer, KVShape, LayerPlan, resolve_kv_format
from kvant.formats.kv_codecs import AffineCodec, FloatCodec, Planes
from kvant.formats.kv_stats import NO_STATS

HALF_LIMIT, HALF_STEP, HALF_TINY = 65504.0, 2.0**-11, 2.0**-25  # float16: largest, rounding relative and absolute
AFFINE = [AffineCodec(8), AffineCodec(4)]
CODECS = [*AFFINE, *(FloatCodec(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))]

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
ORDINARY = st.floats(-10, 10, width=32)


@st.composite
def vectors(draw: st.DrawFn) -> Tensor:
    """[kv_heads, tokens, head_dim]: huge, tiny, constant, mixed, ordinary with outliers."""
    heads, tokens, dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from((2, 8, 16)))
    rows = []
    for _ in range(heads * tokens):
        constant = st.builds(lambda value: [value] * dim, FINITE)
        outlier = st.builds(
            lambda row, value: [value, *row[1:]], st.lists(ORDINARY, min_size=dim, max_size=dim), FINITE
        )
        narrow = st.builds(
            lambda at, row: [at + x / 4096 for x in row], FINITE, st.lists(ORDINARY, min_size=dim, max_size=dim)
        )
        mixed = st.lists(FINITE, min_size=dim, max_size=dim)
        rows.append(draw(st.one_of(mixed, constant, outlier, narrow)))
    return torch.tensor(rows, dtype=torch.float64).float().clamp(-3.4e38, 3.4e38).view(heads, tokens, dim)


def round_trip(codec: AffineCodec | FloatCodec, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])
    return codec.decode(codec.encode(x, positions, NO_STATS), positions, NO_STATS)


@pytest.mark.parametrize("codec", AFFINE, ids=str)
@given(x=vectors())
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


@pytest.mark.parametrize("codec", AFFINE, ids=str)
@given(value=st.floats(width=16, allow_nan=False, allow_infinity=False), dim=st.sampled_from((2, 64)))
def test_a_constant_vector_of_a_float16_value_is_exact(codec, value, dim):
    x = torch.full((1, 1, dim), value)
    assert torch.equal(round_trip(codec, x), x)
    assert not codec.encode(x, torch.zeros(1), NO_STATS)["codes"].any()


@given(x=vectors())
def test_float32_is_exact(x):
    assert torch.equal(round_trip(FloatCodec(torch.float32), x), x)


@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"), [(torch.float16, HALF_STEP, HALF_TINY), (torch.bfloat16, 2.0**-8, 2.0**-133)]
)
@given(x=vectors())
def test_16_bit_rounds_and_saturates(dtype, relative, absolute, x):
    limit = torch.finfo(dtype).max
    expected = x.double().clamp(-limit, limit)
    decoded = round_trip(FloatCodec(dtype), x)
    assert decoded.isfinite().all()
    assert ((decoded.double() - expected).abs() <= expected.abs() * relative + absolute).all()


def test_random_vectors_lose_little():
    """The error that a model feels, relative to the vector: measured once, kept from growing."""
    x = torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(0))
    for name, bound in (("fp32", 0.0), ("fp16", 3e-4), ("bf16", 2.5e-3), ("int8", 0.006), ("int4", 0.11)):
        error = (round_trip(KV_FORMATS[name].key, x) - x).norm() / x.norm()
        assert error <= bound, name


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


def same(first: Planes, second: Planes) -> bool:
    """Bit for bit."""
    return all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@given(x=vectors(), data=st.data())
def test_what_is_stored_for_a_token_depends_on_that_token_alone(codec, x, data):
    positions = torch.tensor(data.draw(st.lists(st.integers(0, 9999), min_size=x.shape[1], max_size=x.shape[1])))
    together = codec.encode(x, positions, NO_STATS)
    order = torch.tensor(data.draw(st.permutations(range(x.shape[1]))))
    shuffled = codec.encode(x[:, order], positions[order], NO_STATS)
    assert same(shuffled, {name: plane[:, order] for name, plane in together.items()})
    for token in range(x.shape[1]):
        for head in range(x.shape[0]):
            alone = codec.encode(x[head : head + 1, token : token + 1], positions[token : token + 1], NO_STATS)
            assert same(alone, {n: p[head : head + 1, token : token + 1].contiguous() for n, p in together.items()})


@pytest.mark.parametrize("name", KV_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_have_the_shapes_and_types_that_the_planes_declare(name, dtype):
    fmt, head_dim = KV_FORMATS[name], 24
    x = torch.randn(3, 5, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    for codec in (fmt.key, fmt.value):
        stored = codec.encode(x, torch.arange(5), NO_STATS)
        assert {plane.name for plane in codec.planes(head_dim)} == stored.keys()
        for plane in codec.planes(head_dim):
            assert stored[plane.name].shape == (3, 5, *plane.shape)
            assert stored[plane.name].dtype == plane.dtype
            assert plane.bytes * 15 == stored[plane.name].nbytes
        decoded = codec.decode(stored, torch.arange(5), NO_STATS)
        assert (decoded.shape, decoded.dtype) == (x.shape, torch.float32)


@pytest.mark.parametrize(("name", "vector"), [("fp32", 256), ("fp16", 128), ("bf16", 128), ("int8", 68), ("int4", 36)])
def test_bytes_by_hand(name, vector):
    fmt = KV_FORMATS[name]
    assert fmt.bytes_per_token(KVShape(num_layers=30, num_kv_heads=3, head_dim=64)) == 30 * 3 * 2 * vector
    assert fmt.bits_per_element(64) == vector * 8 / 64


def test_int4_holds_3_5_times_as_many_tokens_as_16_bit_and_int8_1_9_times():
    shape = KVShape(30, 3, 64)
    wide = KV_FORMATS["fp16"].bytes_per_token(shape)
    assert wide / KV_FORMATS["int4"].bytes_per_token(shape) > 3.5
    assert wide / KV_FORMATS["int8"].bytes_per_token(shape) > 1.85


def test_auto_is_16_bit_in_the_models_own_kind():
    assert resolve_kv_format("auto", torch.bfloat16).name == "bf16"
    assert resolve_kv_format("auto", torch.float16).name == "fp16"
    assert resolve_kv_format("auto", torch.float32).name == "fp16"
    for name in KV_FORMATS:
        assert resolve_kv_format(name, torch.bfloat16).name == name


def test_an_unknown_format_names_those_there_are():
    with pytest.raises(ConfigError, match=r"kv_cache_dtype='int3' is unknown; choose one of auto, .*int8, int4"):
        resolve_kv_format("int3", torch.float32)


def test_a_layer_shows_each_codec_its_own_planes():
    planes = {plane.name: torch.zeros(1, 1, 8, *plane.shape) for plane in KV_FORMATS["int4"].planes(16)}
    layer = KVLayer(LayerPlan(KV_FORMATS["int4"]), 8, 0, planes)
    assert layer.side("key").keys() == layer.side("value").keys() == {"codes", "affine"}
    assert layer.side("key")["codes"] is planes["key.codes"]
    assert layer.side("value")["affine"] is planes["value.affine"]
