"""Every backend that runs here, op by op, against the float64 statement of the op in tests/kernels/oracle.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kvant.formats.kv import KV_FORMATS
from kvant.formats.weight import InputCodes, PackedWeight
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.ops import AttentionShape, Ops, SamplingBatch
from kvant.kernels.select import available_backends
from kvant.quantize.rtn import rtn
from tests.formats.oracle import HALF_LIMIT, assert_encodes
from tests.kernels import oracle
from tests.kernels.scenes import Scene, attended, random, scene_of, step_kv, step_planes, step_slots
from tests.kernels.tolerances import IN_AN_ELEMENT, rounded_bits

SOME = settings(max_examples=25)
FEW = 10
# Largest error relative to the largest element: a few roundings of the compute type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
DTYPES = st.sampled_from(tuple(TOLERANCE))
SEEDS = st.integers(0, 10_000)


def few_interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Of a test's examples, only the first few for kernels in Triton's interpreter; all, once one has failed."""
    ran, failed = Counter[str](), set[str]()

    @wraps(test)
    def some(ops: Ops, **drawn: Any) -> None:
        case = f"{ops.name} {drawn.get('name')}"
        if ops.name == "triton" and ran[case] >= FEW and case not in failed:
            return
        ran[case] += 1
        try:
            test(ops, **drawn)
        except Exception:
            failed.add(case)
            raise

    return some


@pytest.fixture(params=sorted(available_backends()), scope="module")
def ops(request: pytest.FixtureRequest) -> Ops:
    return available_backends()[request.param]()


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "triton")) for name in sorted(available_backends())],
    scope="module",
)
def attending(request: pytest.FixtureRequest) -> Ops:
    """Of the backends, whose attention is tested; what is interpreted is slow, and has tests of its own."""
    return available_backends()[request.param]()


def assert_close(found: Tensor, expected, dtype: torch.dtype, scale: float = 1.0, coarse: float = 0.0) -> None:
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    error = (found.double() - expected).abs().max()
    assert error <= (TOLERANCE[dtype] * scale + coarse) * max(float(expected.abs().max()), 1.0)


@SOME
@given(
    rows=st.integers(1, 40),
    inputs=st.sampled_from((8, 48, 200)),
    outputs=st.integers(1, 70),
    dtype=DTYPES,
    bias=st.booleans(),
    seed=SEEDS,
)
def test_linear(ops, rows, inputs, outputs, dtype, bias, seed):
    x, weight = random(seed, rows, inputs, dtype=dtype), random(seed + 1, outputs, inputs, dtype=dtype)
    b = random(seed + 2, outputs, dtype=dtype) if bias else None
    found = ops.linear(x, ops.prepare(PackedWeight.dense(weight)), b)
    expected = x.double() @ weight.double().T + (0.0 if b is None else b.double())
    assert_close(found, expected, dtype, scale=2)


@st.composite
def quantized(draw: st.DrawFn) -> PackedWeight:
    """A weight of few bits with made-up planes: any group, a smaller last one, zero points, columns in disorder.

    Float16 holds its scales, whatever type they are given in.
    """
    bits, columns = draw(st.sampled_from((4, 8))), draw(st.sampled_from((8, 32, 48, 64, 96, 128, 200, 256, 384)))
    group = draw(st.sampled_from((8, 16, 32, 48, 64, 96, 128, columns)))
    rows, seed = draw(st.sampled_from((1, 5, 8, 13, 36, 70))), draw(SEEDS)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 256, (rows, columns * bits // 8), generator=generator, dtype=torch.uint8)
    scale = random(seed + 1, rows, -(-columns // group)).exp() * 2.0**-bits * (1 - 2 * draw(st.booleans()))
    scale = scale.bfloat16().half().to(draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32))))
    # Zero points like those of GGUF's blocks: anywhere among the codes.
    zero = random(seed + 2, *scale.shape).sigmoid() * (2**bits - 1)
    match draw(st.sampled_from(("", "bias", "zero"))):
        case "bias":
            weight = PackedWeight.quantized(bits, q, scale, (-zero * scale).half(), group_size=group)
        case "zero":
            weight = PackedWeight.quantized(bits, q, scale, zero=zero.round().to(torch.uint8), group_size=group)
        case _:
            weight = PackedWeight.quantized(bits, q, scale, group_size=group)
    return replace(weight, order=torch.randperm(columns, generator=generator) if draw(st.booleans()) else None)


def products(x: Tensor, weight: Tensor) -> Tensor:
    """The sums of |x||w|, [T, N] float64: what errors of rounding are relative to."""
    return x.double().abs() @ weight.double().abs().T


@SOME
@given(weight=quantized(), rows=st.integers(1, 100), dtype=DTYPES, bias=st.booleans(), seed=SEEDS)
def test_quantized_linear(ops, weight, rows, dtype, bias, seed):
    """Inputs may be rounded to 8 bit, 32 columns together."""
    x, matrix = random(seed, rows, weight.in_features, dtype=dtype), weight.dequantize(torch.float64)
    b = random(seed + 1, weight.out_features, dtype=dtype) if bias else None
    found = ops.linear(x, ops.prepare(weight), b)
    assert (found.shape, found.dtype) == ((rows, weight.out_features), dtype)
    exact = x.double() @ matrix.T
    error = found.double() - exact - (0.0 if b is None else b.double())
    # The norm that the result has where inputs and weights have nothing in common.
    usual = x.double().norm() * matrix.norm() / weight.in_features**0.5
    stored = TOLERANCE[dtype] * (exact.norm() + (0.0 if b is None else b.double().norm() * rows**0.5))
    few = 1 + 5 / found.numel() ** 0.5  # a single element may well be off by more than many are on average
    assert error.norm() <= 0.01 * few * usual + stored


@settings(max_examples=100)
@given(weight=quantized(), rows=st.integers(1, 100), bias=st.booleans(), seed=SEEDS)
@few_interpreted
def test_quantized_linear_is_exact_where_8_bits_hold_the_inputs(ops, weight, rows, bias, seed):
    """So no scale, zero point or code can be another's. Scales of many rows may be integers, relative to their sum."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, weight.in_features), generator=generator)
    codes[:, ::16] = codes[:, 1::16] = 127  # so there are two in each group of 32, and neither is left out of it
    groups = -(-weight.in_features // 32)
    steps = 2.0 ** torch.randint(-6, 7, (rows, groups), generator=generator)
    x = codes * steps.repeat_interleave(32, dim=1)[:, : weight.in_features]
    if weight.order is not None:  # columns that are stored together are rounded together
        x = torch.empty_like(x).index_copy(1, weight.order, x)
    matrix, b = weight.dequantize(torch.float64), random(seed, weight.out_features) if bias else None
    error = ops.linear(x, ops.prepare(weight), b).double() - x.double() @ matrix.T - (0.0 if b is None else b.double())
    close = 2e-3 if isinstance(ops, CpuOps) and rows > 12 else 1e-5
    assert (error.abs() <= close * (products(x, matrix) + 1)).all()


@SOME
@given(weight=quantized(), rows=st.integers(1, 40), static=st.booleans(), seed=SEEDS)
def test_linear_whose_inputs_are_rounded_to_8_bits(ops, weight, rows, static, seed):
    """A backend that rounds inputs anyway may do that in its own way."""
    x, matrix = random(seed, rows, weight.in_features), weight.dequantize(torch.float64)
    inputs = InputCodes(x.abs().amax().reshape(1) / 127 if static else None)
    found = ops.linear(x, ops.prepare(replace(weight, inputs=inputs)))
    usual = x.double().norm() * matrix.norm() / weight.in_features**0.5
    assert (found - x.double() @ matrix.T).norm() <= 0.015 * (1 + 5 / found.numel() ** 0.5) * usual


@pytest.mark.parametrize("size", [1e-8, 1e-6, 3e-5, 1.0, 1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_of_any_size_give_the_values(ops, size, dtype):
    """Float16 has neither the smallest nor the largest of them."""
    q = torch.randint(0, 256, (20, 64), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    scale = ((1 + random(2, 20, 2).abs()) * size).to(dtype)
    weight = PackedWeight.quantized(8, q, scale, zero=q[:, :2])
    found, expected = ops.embedding(torch.arange(20), ops.prepare(weight)), weight.dequantize(torch.float64)
    assert (found - expected).abs().max() <= 2.0**-10 * expected.abs().max()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_quantized_linear_hides_no_input_that_is_not_finite(ops, bad, rows):
    x, weight = random(1, rows, 64), ops.prepare(rtn(random(2, 20, 64), 4, 32))
    x[rows // 2, 5] = bad
    finite = ops.linear(x, weight).isfinite()
    assert not finite[rows // 2].any()
    assert finite.all(-1).sum() == rows - 1


@SOME
@given(weight=quantized(), rows=st.integers(1, 30), seed=SEEDS)
def test_an_input_much_larger_than_the_others_makes_them_no_coarser(ops, weight, rows, seed):
    x, matrix = random(seed, rows, weight.in_features), weight.dequantize(torch.float64)
    others = x.double().norm(dim=-1).mean() * matrix.norm()
    x[torch.arange(rows), torch.arange(rows) * 7 % (weight.in_features // 8 * 8)] = 1e4
    error = ops.linear(x, ops.prepare(weight)).double() - x.double() @ matrix.T
    assert error.abs().max() <= 0.02 * others + 1e-5 * 1e4 * matrix.abs().max()


@SOME
@given(weight=quantized(), ids=st.lists(st.integers(0, 69), min_size=1, max_size=20))
def test_quantized_embedding(ops, weight, ids):
    ids = torch.tensor(ids) % weight.out_features
    found, expected = ops.embedding(ids, ops.prepare(weight)), weight.dequantize(torch.float32)[ids]
    assert found.dtype == torch.float32
    if "bias" in weight.planes:
        assert_close(found, expected, torch.float32)
    else:
        assert torch.equal(found, expected)


@SOME
@given(
    vocab=st.integers(1, 50),
    width=st.integers(1, 33),
    dtype=DTYPES,
    ids=st.lists(st.integers(0, 49), min_size=1),
    seed=SEEDS,
)
def test_embedding(ops, vocab, width, dtype, ids, seed):
    weight = random(seed, vocab, width, dtype=dtype)
    ids = [i % vocab for i in ids]
    found = ops.embedding(torch.tensor(ids), ops.prepare(PackedWeight.dense(weight)))
    assert found.dtype == dtype
    assert torch.equal(found, torch.stack([weight[i] for i in ids]))


@SOME
@given(
    rows=st.integers(1, 9), width=st.integers(1, 65), dtype=DTYPES, size=st.sampled_from((1e-3, 1.0, 100.0)), seed=SEEDS
)
def test_norms(ops, rows, width, dtype, size, seed):
    x, weight = (random(seed, rows, width) * size).to(dtype), 1 + random(seed + 1, width)
    residual = (random(seed + 2, rows, width) * size).to(dtype)
    expected = oracle.rms_norm(x.double().numpy(), weight.double().numpy(), 1e-5)
    assert_close(ops.rms_norm(x, weight, 1e-5), expected, dtype, scale=2)
    before = residual.clone()
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(residual, before)
    assert_close(normed, oracle.rms_norm(total.double().numpy(), weight.double().numpy(), 1e-5), dtype, scale=2)


@pytest.mark.parametrize("heads", [1, 3])
def test_norms_of_single_heads(ops, heads):
    x, weight = random(1, 5, heads, 16), 1 + random(2, 16)
    expected = oracle.rms_norm(x.double().numpy(), weight.double().numpy(), 1e-6).reshape(5, heads, 16)
    assert_close(ops.rms_norm(x, weight, 1e-6), expected, torch.float32, scale=2)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@SOME
@given(rows=st.integers(1, 9), width=st.integers(1, 40), dtype=DTYPES, seed=SEEDS)
def test_gated(ops, activation, rows, width, dtype, seed):
    x = (random(seed, rows, 2 * width) * 3).to(dtype)
    assert_close(ops.gated(x, activation), oracle.gated(x.double().numpy(), activation), dtype, scale=3)


LENGTHS = st.lists(
    st.tuples(st.sampled_from((0, 0, 1, 7, 8, 15, 16, 17, 60, 127, 130)), st.sampled_from((1, 1, 1, 2, 8, 9, 16, 33))),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", KV_FORMATS)
@SOME
@given(
    lengths=LENGTHS, kv_heads=st.integers(1, 3), ratio=st.sampled_from((1, 2, 3, 7)),
    dim=st.sampled_from((16, 64, 80, 96, 128)), block_size=st.sampled_from((8, 16, 64, 256)),
    window=st.sampled_from((None, None, 1, 5, 16, 100)), softcap=st.sampled_from((None, None, 2.0, 30.0)),
    dtype=DTYPES, seed=SEEDS,
)  # fmt: skip
def test_attention(attending, name, lengths, kv_heads, ratio, dim, block_size, window, softcap, dtype, seed):
    it = scene_of(KV_FORMATS[name], kv_heads, dim, block_size, lengths, seed)
    shape = AttentionShape(kv_heads * ratio, kv_heads, dim, 1.3 / dim**0.5, window, softcap)
    q = random(seed + 1, it.tokens, shape.num_heads, dim, dtype=dtype)
    before = {name: plane.clone() for name, plane in it.cache.planes.items()}
    found, coarse = (
        attending.attention(q, it.cache, it.batch, shape),
        IN_AN_ELEMENT[rounded_bits(attending, it.cache.format, dim)],
    )
    assert_close(found, attended(it, q, shape), dtype, scale=4, coarse=coarse)
    assert all(torch.equal(plane, it.cache.planes[name]) for name, plane in before.items()), "attention wrote"


@pytest.mark.parametrize("name", KV_FORMATS)
@SOME
@given(
    lengths=LENGTHS, kv_heads=st.integers(1, 3), ratio=st.sampled_from((1, 2, 7)), dim=st.sampled_from((16, 64, 80)),
    block_size=st.sampled_from((8, 16)), rotated=st.sampled_from((None, 16, 8)), dtype=DTYPES, seed=SEEDS,
)  # fmt: skip
@few_interpreted
def test_rope_write_kv(ops, name, lengths, kv_heads, ratio, dim, block_size, rotated, dtype, seed):
    it = scene_of(KV_FORMATS[name], kv_heads, dim, block_size, lengths, seed)
    q, k, v = (
        random(seed + i, it.tokens, h, dim, dtype=dtype) for i, h in enumerate((kv_heads * ratio, kv_heads, kv_heads))
    )
    angles = it.batch.positions.unsqueeze(1) * 0.7 ** torch.arange((rotated or 2) // 2)
    rotary = (angles.cos() * 1.1, angles.sin() * 1.1) if rotated else None
    before = {name: plane.clone() for name, plane in it.cache.planes.items()}
    inputs = [x.clone() for x in (q, k, v)]
    found = ops.rope_write_kv(q, k, v, rotary, it.cache, it.batch)
    assert all(torch.equal(x, y) for x, y in zip(inputs, (q, k, v), strict=True)), "an input was changed"
    turned = [x.double() for x in (q, k)]
    if rotary is not None:
        turned = [torch.tensor(oracle.rotate(x.numpy(), *(part.double().numpy() for part in rotary))) for x in turned]
    assert_close(found, turned[0], dtype, scale=2)
    off = 2 * TOLERANCE[dtype] * bool(rotated) * turned[1].abs().amax(-1, keepdim=True).transpose(0, 1)
    _check_written(it, "key", turned[1].transpose(0, 1), off)
    _check_written(it, "value", v.double().transpose(0, 1), torch.zeros_like(off))
    _check_untouched(it, before)


def _check_written(it: Scene, side: str, x: Tensor, off: Tensor) -> None:
    """The slots of the step hold what the format makes of x [kv_heads, T, head_dim], off by `off` at most."""
    plan, positions = it.cache.plan, it.batch.positions
    codec, stats = (plan.format.key, plan.key_stats) if side == "key" else (plan.format.value, plan.value_stats)
    off, sink = off.expand_as(x), positions < plan.format.sinks
    assert_encodes(codec, step_planes(it, side), x[:, ~sink], positions[~sink], stats, off[:, ~sink])
    held = step_kv(it, it.cache)[side == "value"][:, sink].double()
    exact = x[:, sink].clamp(-HALF_LIMIT, HALF_LIMIT)
    assert ((held - exact).abs() <= exact.abs() * 2.0**-11 + 2.0**-25 + 1.001 * off[:, sink]).all()


def _check_untouched(it: Scene, before: dict[str, Tensor]) -> None:
    written = step_slots(it)
    size = it.cache.block_size
    for name, plane in before.items():
        now = it.cache.planes[name].clone()
        now[written // size, :, written % size] = plane[written // size, :, written % size]
        assert torch.equal(now, plane), f"{name}: a slot was written that is not the step's"


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from((0.0, 0.3, 1.0, 4.0)),
            st.sampled_from((0, 1, 3, 500)),
            st.sampled_from((1.0, 0.9, 0.4, 1e-4)),
            st.sampled_from((0.0, 0.05, 0.5, 1.0)),
            st.floats(0, 1, exclude_max=True),
        ),
        min_size=1, max_size=6,
    ),
    vocab=st.integers(1, 60), ties=st.booleans(), seed=SEEDS,
)  # fmt: skip
@few_interpreted
def test_sample(ops, rows, vocab, ties, seed):
    logits = random(seed, len(rows), vocab) * 2
    logits = logits.round() if ties else logits
    temperature, top_k, top_p, min_p, uniform = zip(*rows, strict=True)
    params = SamplingBatch(
        torch.tensor(temperature), torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p),
        torch.tensor(uniform, dtype=torch.float64),
    )  # fmt: skip
    before = logits.clone()
    tokens = ops.sample(logits, params)
    assert (tokens.shape, tokens.dtype) == ((len(rows),), torch.int64)
    assert torch.equal(logits, before)
    for row, token in enumerate(tokens.tolist()):
        assert token in oracle.draws(logits[row].double().numpy(), *rows[row], slack=1e-6)


def test_sample_leaves_out_what_is_impossible(ops):
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0]])
    for uniform, token in ((0.0, 1), (0.49, 1), (0.51, 3), (1 - 2.0**-53, 3)):
        row = SamplingBatch(
            *(torch.tensor([x]) for x in (1.0, 0, 1.0, 0.0)), torch.tensor([uniform], dtype=torch.float64)
        )
        assert ops.sample(logits, row).tolist() == [token]


def test_sample_covers_the_distribution_evenly(ops):
    """A thousand equally spaced draws hit each token as often as its probability says."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 2.0])
    count = 1000
    row = SamplingBatch(
        torch.full((count,), 0.7), torch.zeros(count, dtype=torch.int64), torch.ones(count), torch.zeros(count),
        (torch.arange(count, dtype=torch.float64) + 0.5) / count,
    )  # fmt: skip
    seen = ops.sample(logits.expand(count, -1), row).bincount(minlength=5)
    assert (seen - (logits / 0.7).softmax(0) * count).abs().max() <= 1
