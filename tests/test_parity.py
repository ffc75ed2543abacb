"""Every backend that runs here, op by op, against the float64 statement of the op in tests/kernels/oracle.py."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from kvant.formats.kv import KV_FORMATS, LayerPlan
from kvant.formats.weight import PackedWeight
from kvant.kernels.ops import AttentionShape, Ops, SamplingBatch
from kvant.kernels.select import available_backends
from tests.formats.oracle import HALF_LIMIT, assert_encodes
from tests.formats.stats import layer_plan_of
from tests.kernels import oracle
from tests.kernels.scenes import Scene, scene, step_kv, step_planes, step_slots

SOME = settings(max_examples=25)
# Largest error relative to the largest element: a few roundings of the compute type.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
DTYPES = st.sampled_from(tuple(TOLERANCE))
SEEDS = st.integers(0, 10_000)


@pytest.fixture(params=sorted(available_backends()), scope="module")
def ops(request: pytest.FixtureRequest) -> Ops:
    return available_backends()[request.param]()


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(found: Tensor, expected, dtype: torch.dtype, scale: float = 1.0) -> None:
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape
    assert found.dtype == dtype
    error = (found.double() - expected).abs().max()
    assert error <= TOLERANCE[dtype] * scale * max(float(expected.abs().max()), 1.0)


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


def scene_of(name: str, kv_heads: int, dim: int, block_size: int, lengths: list[tuple[int, int]], seed: int) -> Scene:
    """A scene in a format with made-up constants; blocks are large enough for its sinks."""
    layer: LayerPlan = layer_plan_of(KV_FORMATS[name], kv_heads, dim, seed % 3)
    sink_slots = layer.format.lead + layer.format.sinks
    return scene(layer, kv_heads, dim, max(block_size, sink_slots), lengths, seed)


LENGTHS = st.lists(
    st.tuples(st.sampled_from((0, 0, 1, 7, 8, 15, 16, 17, 60, 127, 130)), st.sampled_from((1, 1, 1, 2, 8, 9, 16, 33))),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", KV_FORMATS)
@SOME
@given(
    lengths=LENGTHS, kv_heads=st.integers(1, 3), ratio=st.sampled_from((1, 2, 3, 7)),
    dim=st.sampled_from((16, 64, 80, 128)), block_size=st.sampled_from((8, 16, 64, 256)),
    window=st.sampled_from((None, None, 1, 5, 16, 100)), softcap=st.sampled_from((None, None, 2.0, 30.0)),
    dtype=DTYPES, seed=SEEDS,
)  # fmt: skip
def test_attention(ops, name, lengths, kv_heads, ratio, dim, block_size, window, softcap, dtype, seed):
    it = scene_of(name, kv_heads, dim, block_size, lengths, seed)
    shape = AttentionShape(kv_heads * ratio, kv_heads, dim, 1.3 / dim**0.5, window, softcap)
    q = random(seed + 1, it.tokens, shape.num_heads, dim, dtype=dtype)
    expected = torch.zeros(q.shape, dtype=torch.float64)
    for sequence, (start, stop) in enumerate(pairwise(it.batch.query_starts)):
        keys, values = it.keys[sequence].double().numpy(), it.values[sequence].double().numpy()
        for token in range(start, stop):
            position = int(it.batch.positions[token])
            expected[token] = torch.tensor(oracle.attend(q[token].double().numpy(), keys, values, position, shape))
    before = {name: plane.clone() for name, plane in it.cache.planes.items()}
    assert_close(ops.attention(q, it.cache, it.batch, shape), expected, dtype, scale=4)
    assert all(torch.equal(plane, it.cache.planes[name]) for name, plane in before.items()), "attention wrote"


@pytest.mark.parametrize("name", KV_FORMATS)
@SOME
@given(
    lengths=LENGTHS, kv_heads=st.integers(1, 3), ratio=st.sampled_from((1, 2, 7)), dim=st.sampled_from((16, 64, 80)),
    block_size=st.sampled_from((8, 16)), rotated=st.sampled_from((None, 16, 8)), dtype=DTYPES, seed=SEEDS,
)  # fmt: skip
def test_rope_write_kv(ops, name, lengths, kv_heads, ratio, dim, block_size, rotated, dtype, seed):
    it = scene_of(name, kv_heads, dim, block_size, lengths, seed)
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
