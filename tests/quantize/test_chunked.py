"""The ops that quantizing computes with, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvant.formats.weight import InputCodes, PackedWeight
from kvant.kernels.ops import AttentionShape
from kvant.kernels.reference import ReferenceOps
from kvant.models.spec import LayerSpec, ModelSpec, RopeSpec
from kvant.quantize.chunked import ChunkedOps, UnpreparedOps, fast_dtype
from kvant.quantize.grid import Grid, GridSpec
from kvant.quantize.reader import Reader

SPEC = ModelSpec("llama", 32, 32, 48, 4, 2, 16, (LayerSpec(RopeSpec(16)),), 4096, 0.25)


def weight(rounded_inputs: bool) -> PackedWeight:
    values = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    grid = Grid.plain(GridSpec(8, 64, True), values)
    packed = grid.pack(grid.codes(values))
    return replace(packed, inputs=InputCodes()) if rounded_inputs else packed


@pytest.mark.parametrize("rounded_inputs", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_the_references(dtype: torch.dtype, rounded_inputs: bool) -> None:
    x, bias = torch.randn(1500, 64), torch.randn(24)
    expected = ReferenceOps().linear(x, ReferenceOps().prepare(weight(rounded_inputs)), bias)
    ops = ChunkedOps(dtype)
    found = ops.linear(x, ops.prepare(weight(rounded_inputs)), bias)
    tolerance = 1e-4 if dtype == torch.float32 or rounded_inputs else 0.02
    assert found.dtype == torch.float32
    assert (found - expected).norm() < tolerance * expected.norm()
    torch.testing.assert_close(UnpreparedOps().linear(x, weight(rounded_inputs), bias), expected, atol=1e-3, rtol=1e-4)


def test_the_fast_dtype_is_one_that_products_are_computed_in() -> None:
    assert fast_dtype() in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (7, None), (None, 5.0)])
def test_attention_is_the_references(window: int | None, softcap: float | None) -> None:
    reader = Reader.of(SPEC, ChunkedOps(), 3, 40)
    q, k, v = torch.randn(120, 4, 16), torch.randn(120, 2, 16), torch.randn(120, 2, 16)
    cache, shape = reader.store.layers[0], AttentionShape(4, 2, 16, 0.25, window, softcap)
    q = ReferenceOps().rope_write_kv(q, k, v, None, cache, reader.batch)
    expected = ReferenceOps().attention(q, cache, reader.batch, shape)
    torch.testing.assert_close(ChunkedOps().attention(q, cache, reader.batch, shape), expected, atol=1e-5, rtol=1e-5)
