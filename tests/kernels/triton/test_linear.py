"""Linear layers and embeddings where the parity test does not look: each way of computing them, on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from kvant.formats.weight import InputCodes, PackedWeight
from kvant.kernels.reference import rounded_inputs
from kvant.kernels.triton import linear_int8, linear_packed
from kvant.kernels.triton.embedding import embedding, expanded
from kvant.kernels.triton.input_codes import input_codes
from kvant.kernels.triton.launch import Config
from kvant.kernels.triton.linear import linear
from kvant.kernels.triton.span_codes import codes_less
from kvant.kernels.triton.weights import Dense, RowCodes, SpanCodes, prepare
from tests.kernels.triton.interpreter import run_assembly

CPU = torch.device("cpu")
# ||found - expected|| / ||expected||: operands, and for float16 and bfloat16 the result, are rounded.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is full of what no result may have, so that nothing is left unwritten unseen."""
    empty = torch.empty

    def poisoned(*sizes: Any, **options: Any) -> Tensor:
        memory = empty(*sizes, **options)
        return memory.fill_(float("nan") if memory.is_floating_point() else 101)

    monkeypatch.setattr(torch, "empty", poisoned)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed(bits: int, n: int, k: int, group: int, kind: str = "symmetric", dtype: torch.dtype = torch.float16) -> Any:
    generator = torch.Generator().manual_seed(n * k + group)
    q = torch.randint(0, 256, (n, k * bits // 8), generator=generator, dtype=torch.uint8)
    scale = ((1 + random(1, n, -(-k // group)).abs()) * 2.0**-bits).to(dtype)
    zero = torch.randint(0, 2**bits, scale.shape, generator=generator, dtype=torch.uint8)
    bias = (-zero.float() * scale.float() * 1.1).half()
    given = {"zero": zero} if kind == "zero" else {"bias": bias} if kind == "bias" else {}
    return PackedWeight.quantized(bits, q, scale, group_size=group, **given)


def spans(weight: PackedWeight) -> SpanCodes:
    made = prepare(weight, CPU)
    assert isinstance(made, SpanCodes)
    return made


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", ["symmetric", "zero", "bias"])
@pytest.mark.parametrize(("bits", "k", "group"), [(4, 200, 16), (4, 320, 48), (8, 72, 72), (8, 130, 32), (4, 96, 128)])
def test_matrices_are_expanded_to_their_values(bits, k, group, kind):
    weight = packed(bits, 21, k, group, kind)
    found = expanded(spans(weight), torch.float32)
    torch.testing.assert_close(found, weight.dequantize(torch.float32), rtol=1e-6, atol=1e-6)


def test_weights_say_how_large_they_are():
    weight = spans(packed(4, 64, 512, 128))
    assert weight.shape == (64, 512)
    assert weight.nbytes == 64 * 512 // 2 + 64 * 4 * 2 + weight.arrivals.nbytes
    assert prepare(PackedWeight.dense(random(1, 3, 5)), CPU).shape == (3, 5)


def test_groups_that_no_loop_knows_become_plain():
    weight = packed(8, 5, 40, 8)
    made = prepare(weight, CPU)
    assert isinstance(made, Dense)
    assert torch.equal(made.matrix, weight.dequantize(torch.float32))


def config(rows: int, tokens: int, step: int, split: int, fold: int) -> Config:
    return Config({"ROWS": rows, "TOKENS": tokens, "STEP": step, "SPLIT": split, "FOLD": fold})


WAYS = [
    # bits, n, k, group, m, rows, tokens, step, split: a step of several groups, of one, of a part of one
    (4, 40, 512, 64, 1, 16, 8, 2, 3),
    (4, 33, 320, 32, 5, 32, 16, 4, 1),
    (4, 16, 448, 16, 3, 16, 16, 2, 2),
    (4, 70, 512, 512, 20, 64, 32, 4, 2),
    (4, 20, 264, 128, 40, 32, 16, 1, 1),
    (8, 40, 256, 16, 2, 16, 8, 4, 2),
    (8, 24, 192, 32, 17, 32, 16, 2, 1),
    (8, 17, 300, 300, 1, 16, 16, 4, 3),
    (4, 20, 640, 128, 3, 32, 16, 4, 1),
    (4, 20, 1280, 256, 3, 32, 16, 2, 2),
    (8, 20, 320, 64, 3, 32, 16, 4, 1),
    (8, 20, 640, 128, 3, 32, 16, 2, 2),
]


@pytest.mark.parametrize("kind", ["symmetric", "zero", "bias"])
@pytest.mark.parametrize("fold", [0, 1], ids=["weights scaled", "sums scaled"])
@pytest.mark.parametrize(("bits", "n", "k", "group", "m", "rows", "tokens", "step", "split"), WAYS)
def test_products(bits, n, k, group, m, rows, tokens, step, split, fold, kind):
    weight = packed(bits, n, k, group, kind)
    for dtype in (torch.float32, torch.bfloat16 if bits == 4 else torch.float16):
        x = random(3, m, k, dtype=dtype)
        found = linear_packed.linear_packed(x, spans(weight), None, config(rows, tokens, step, split, fold))
        assert found.dtype == dtype
        assert error(found, x.double() @ weight.dequantize(torch.float64).T) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fold", [0, 1], ids=["weights scaled", "sums scaled"])
@pytest.mark.parametrize(("bits", "kind"), [(4, "symmetric"), (4, "zero"), (4, "bias"), (8, "zero"), (8, "bias")])
def test_products_with_assembly(bits, kind, fold, dtype, monkeypatch):
    run_assembly(monkeypatch)
    monkeypatch.setattr(linear_packed, "interpreted", lambda: False)
    weight, x = packed(bits, 20, 320, 32, kind), random(3, 3, 320, dtype=dtype)
    found = linear_packed.linear_packed(x, spans(weight), None, config(32, 16, 2, 1, fold))
    assert error(found, x.double() @ weight.dequantize(torch.float64).T) < TOLERANCE[dtype]


def test_a_matrix_may_be_expanded_first():
    weight, x, bias = packed(4, 24, 128, 32, "zero"), random(3, 50, 128), random(4, 24)
    found = linear_packed.linear_packed(x, spans(weight), bias, linear_packed.EXPAND)
    assert error(found, x.double() @ weight.dequantize(torch.float64).T + bias.double()) < 1e-6


@pytest.mark.parametrize("m", [1, 9])
def test_bias_and_order_and_strides(m):
    k, n = 192, 40
    order = torch.randperm(k, generator=torch.Generator().manual_seed(5))
    weight, bias = replace(packed(4, n, k, 64, "zero"), order=order), random(6, n, dtype=torch.float16)
    expected = weight.dequantize(torch.float64)
    for x in (random(7, m, 2 * k)[:, :k], random(7, k, m).T):
        assert error(linear(x, prepare(weight, CPU), bias), x.double() @ expected.T + bias.double()) < 1e-6


def test_split_sums_are_the_same_each_time_and_leave_nothing_behind():
    weight, x = spans(packed(4, 48, 1024, 128)), random(3, 2, 1024, dtype=torch.float16)
    first = linear_packed.linear_packed(x, weight, None, config(16, 16, 2, 5, 1))
    assert not weight.arrivals.any()
    assert torch.equal(linear_packed.linear_packed(x, weight, None, config(16, 16, 2, 5, 1)), first)


def test_sums_of_several_blocks_of_tokens_may_be_split():
    weight, x = packed(4, 40, 256, 64), random(3, 50, 256)
    found = linear_packed.linear_packed(x, spans(weight), None, config(16, 16, 1, 2, 1))
    assert error(found, x.double() @ weight.dequantize(torch.float64).T) < 1e-6


def test_more_blocks_than_can_be_counted_are_an_error():
    with pytest.raises(ValueError, match="65 blocks are cut, and 64 can be counted"):
        linear_packed.linear_packed(random(1, 1025, 256), spans(packed(4, 16, 256, 64)), None, config(16, 16, 1, 2, 1))


@pytest.mark.parametrize("kind", ["symmetric", "zero"])
@pytest.mark.parametrize(
    ("bits", "dtype", "size"),
    [(4, torch.bfloat16, 1e-8), (4, torch.bfloat16, 1e7), (4, torch.float16, 1e-8), (8, torch.float16, 1e-8)],
    ids=str,
)
def test_scales_that_float16_does_not_hold(bits, dtype, size, kind):
    weight, x = packed(bits, 20, 128, 64, kind, torch.float32), random(1, 3, 128)
    weight.planes["scale"].data.mul_(size)
    x = (x * 1e4).to(dtype) if size < 1 else x.to(dtype)  # what comes of it is a number of the usual size
    for fold in (0, 1):
        found = linear_packed.linear_packed(x, spans(weight), None, config(32, 16, 1, 1, fold))
        assert error(found, x.double() @ weight.dequantize(torch.float64).T) < TOLERANCE[dtype]


def test_no_tokens():
    for weight in (packed(4, 16, 64, 32), replace(packed(8, 16, 64, 64), inputs=InputCodes())):
        assert linear(random(1, 0, 64), prepare(weight, CPU)).shape == (0, 16)
        assert embedding(torch.empty(0, dtype=torch.int64), prepare(weight, CPU)).shape == (0, 64)


REAL = [
    (1, 4096, 4096),
    (1, 22016, 4096),
    (16, 4096, 11008),
    (64, 12288, 4096),
    (100, 4096, 4096),
    (300, 4096, 4096),
    (4096, 4096, 4096),
]


@pytest.mark.parametrize(("m", "n", "k"), REAL)
def test_configurations_for_real_layers(m, n, k):
    weight = SpanCodes((n, k), 4, 128, "pair", *(torch.zeros(1),) * 2, 1.0, None, None, torch.zeros(1))
    found = linear_packed.candidates(m, weight, torch.bfloat16)
    assert found[0] == linear_packed.default(m, weight, torch.bfloat16)
    for one in found:
        if one != linear_packed.EXPAND:
            blocks = triton.cdiv(m, one.blocks["TOKENS"]) * triton.cdiv(n, one.blocks["ROWS"])
            assert one.blocks["SPLIT"] == 1 or blocks <= n // 16
            assert one.blocks["STEP"] <= 4
    assert (linear_packed.EXPAND in found) == (m > 64)
    assert linear_packed.key(m, weight, torch.bfloat16).startswith(
        f"m{max(8, triton.next_power_of_2(m)) if m > 1 else 1} n{n} k{k}"
    )


def by_row(n: int, k: int, scale: Tensor | None = None) -> tuple[PackedWeight, RowCodes]:
    weight = replace(packed(8, n, k, k, dtype=torch.float32), inputs=InputCodes(scale))
    made = prepare(weight, CPU)
    assert isinstance(made, RowCodes)
    return weight, made


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "split"), [(1, 40, 256, 2), (5, 17, 100, 1), (40, 33, 384, 1)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_products_of_rounded_inputs(m, n, k, split, static, dtype):
    x = random(3, m, k, dtype=dtype)
    weight, made = by_row(n, k, x.float().abs().amax().reshape(1) / 100 if static else None)
    launch = Config({"ROWS": 16, "TOKENS": 16, "DEPTH": 64, "SPLIT": split})
    found = linear_int8.linear_int8(x, made, None, launch)
    assert found.dtype == dtype
    exact = rounded_inputs(x.float(), made.inputs).double() @ weight.dequantize(torch.float64).T
    assert error(found, exact) < TOLERANCE[dtype]


def test_inputs_that_are_codes_already():
    weight, made = by_row(24, 72)
    x, bias = random(3, 4, 72), random(4, 24)
    rounded = input_codes(x, made.inputs, 72)
    found = linear(rounded, made, bias)
    assert torch.equal(found, linear(x, made, bias))
    values = rounded.codes.double() * rounded.scales.double().unsqueeze(1)
    assert error(found, values @ weight.dequantize(torch.float64).T + bias.double()) < 1e-6


def test_rounded_inputs_of_weights_in_groups_or_disorder():
    order = torch.randperm(96, generator=torch.Generator().manual_seed(5))
    x = random(3, 6, 96)
    for weight in (packed(8, 10, 96, 32, "zero"), packed(4, 10, 96, 96), packed(8, 10, 96, 96)):
        weight = replace(weight, inputs=InputCodes(), order=order)
        assert weight.inputs is not None
        exact = rounded_inputs(x, weight.inputs).double() @ weight.dequantize(torch.float64).T
        assert error(linear(x, prepare(weight, CPU)), exact) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("static", [False, True])
def test_rounding_hides_no_input_that_is_not_finite(bad, static):
    _, made = by_row(20, 64, torch.tensor([0.1]) if static else None)
    x = random(1, 4, 64)
    x[2, 5] = bad
    finite = linear(x, made).isfinite()
    assert finite.all(-1).tolist() == [True, True, False, True]
    assert not finite[2].any()


def test_rows_of_weights_with_rounded_inputs():
    weight, made = by_row(20, 72)
    ids = torch.tensor([3, 19, 3])
    assert torch.equal(embedding(ids, made), weight.dequantize(torch.float32)[ids])


@triton.jit
def _unpack(words, zeros, out, PLACE: tl.constexpr, BITS: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    found = codes_less(
        tl.load(words + at)[None, :], tl.load(zeros + tl.arange(0, 1)), PLACE, out.dtype.element_ty, BITS, True
    )
    tl.store(out + at[None, :], found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "zero"), [(4, 0), (4, 8), (4, 15), (8, 0), (8, 128), (8, 255)])
def test_assembly_gives_the_codes(bits, zero, dtype, monkeypatch):
    run_assembly(monkeypatch)
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(-(2**15), 2**15, (1024,), generator=generator).to(torch.int16)
    for place in range(16 // bits):
        out = torch.empty(1024, dtype=dtype)
        _unpack[(1,)](words, torch.tensor([float(zero)]), out, place, bits, 1024)
        codes = (words.int() >> bits * place) & (2**bits - 1)
        assert len(codes.unique()) == 2**bits or bits == 8
        assert torch.equal(out.float(), codes.float() - zero)
