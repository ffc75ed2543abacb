"""GGML blocks as packed weights, against the gguf package's own arithmetic."""

from __future__ import annotations

import gguf
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from hypothesis import given, settings

from kvant.weights.codecs.ggml_blocks import pack_ggml, packed_bits

FORMATS = {
    Kind.Q4_0: ("int4", 32, False),
    Kind.Q4_1: ("int4", 32, True),
    Kind.Q4_K: ("int4", 32, True),
    Kind.Q5_0: ("int8", 32, False),
    Kind.Q5_1: ("int8", 32, True),
    Kind.Q5_K: ("int8", 32, True),
    Kind.Q6_K: ("int8", 16, False),
    Kind.Q8_0: ("int8", 32, False),
}
# The bytes at which the float16 numbers of a block begin.
HALVES = {Kind.Q6_K: (208,)} | dict.fromkeys((Kind.Q4_0, Kind.Q5_0, Kind.Q8_0), (0,))
K_QUANTS = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)


def random_blocks(kind: Kind, rows: int, blocks: int, size: float, seed: int) -> np.ndarray:
    """Any codes and sub-block scales, float16 numbers about `size`: [rows, bytes]."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows, blocks, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for start in HALVES.get(kind, (0, 2)):
        numbers = (random.standard_normal((rows, blocks, 1)) * size).astype(np.float16)
        data[..., start : start + 2] = numbers.view(np.uint8)
    return data.reshape(rows, -1)


def packed_from(data: np.ndarray, kind: Kind, shape: tuple[int, int]):
    return pack_ggml(torch.from_numpy(data), kind, shape)


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
@settings(max_examples=25)
@given(
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    size=st.sampled_from((1e-7, 1e-5, 1e-3, 1.0, 50.0)),
    seed=st.integers(0, 999),
)
def test_packed_blocks_mean_what_the_file_means(kind, rows, blocks, size, seed):
    """Exactly, but for the products of K-quants: their scales and biases are rounded to float16."""
    data, columns = random_blocks(kind, rows, blocks, size, seed), blocks * gguf.GGML_QUANT_SIZES[kind][0]
    packed = packed_from(data, kind, (rows, columns))
    assert packed is not None
    planar = packed.planar()
    assert (planar.format, planar.group_size, "bias" in planar.planes) == FORMATS[kind]
    assert (packed.out_features, packed.in_features) == (rows, columns)
    assert packed.nbytes * 8 == packed_bits(kind) * rows * columns
    found, expected = packed.dequantize(torch.float32), torch.from_numpy(dequantize(data, kind))
    if kind not in K_QUANTS:
        assert torch.equal(found, expected)
    else:
        parts = expected - (bias := _spread(packed, "bias"))
        assert ((found - expected).abs() <= 2.0**-10 * (parts.abs() + bias.abs())).all()


def _spread(packed, name: str) -> torch.Tensor:
    """A plane's values for each element; zeros where there is no such plane."""
    if name not in packed.planes:
        return torch.zeros(packed.out_features, packed.in_features)
    return packed.planes[name].data.float().repeat_interleave(packed.group_size, dim=1)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in K_QUANTS], ids=lambda kind: kind.name)
def test_what_the_package_quantizes(kind):
    """A matrix larger than what is unpacked at once."""
    weight = np.random.default_rng(0).standard_normal((300, 1024), dtype=np.float32)
    data = quantize(weight, kind)
    packed = packed_from(data, kind, weight.shape)
    assert torch.equal(packed.dequantize(torch.float32), torch.from_numpy(dequantize(data, kind)))


@pytest.mark.parametrize("kind", FORMATS, ids=lambda kind: kind.name)
def test_scales_beyond_float16_have_no_packed_form(kind):
    data = random_blocks(kind, 3, 2, 1.0, 0)
    shape = (3, 2 * gguf.GGML_QUANT_SIZES[kind][0])
    assert packed_from(data, kind, shape) is not None
    start = HALVES.get(kind, (0,))[0]
    data[1, start : start + 2] = np.array([60000.0 if kind in K_QUANTS else np.inf], dtype=np.float16).view(np.uint8)
    assert packed_from(data, kind, shape) is None


def test_a_bias_beyond_float16_has_no_packed_form():
    data = random_blocks(Kind.Q4_1, 3, 2, 1.0, 0)
    data[2, 22:24] = np.array([-np.inf], dtype=np.float16).view(np.uint8)
    assert packed_from(data, Kind.Q4_1, (3, 64)) is None


def test_float_types_have_no_packed_form():
    for kind in (Kind.F32, Kind.F16, Kind.BF16):
        assert packed_bits(kind) is None
        assert packed_from(np.zeros((2, 4), dtype=np.uint8), kind, (2, 1)) is None
