"""The reference's own promise: a token's bits do not depend on what else is in the step, nor on how it was cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvant.formats.kv import KV_FORMATS, LayerPlan
from kvant.formats.weight import InputCodes, PackedWeight
from kvant.kernels.ops import AttentionBatch, AttentionShape, SamplingBatch
from kvant.kernels.reference import ReferenceOps
from kvant.quantize.rtn import rtn
from tests.formats.stats import layer_plan_of
from tests.kernels.scenes import Scene, scene

OPS = ReferenceOps()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["one-thread", "two-threads"])
def _threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 96), (576, 960), (1536, 576), (64, 5000)])
def test_a_row_of_a_product_is_the_same_in_any_company(dtype, inputs, outputs):
    weight = OPS.prepare(PackedWeight.dense(random(1, outputs, inputs, dtype=dtype)))
    x, bias = random(2, 70, inputs, dtype=dtype), random(3, outputs, dtype=dtype)
    whole = OPS.linear(x, weight, bias)
    for start, stop in ((0, 1), (69, 70), (3, 5), (1, 14), (20, 53), (0, 64)):
        assert torch.equal(OPS.linear(x[start:stop], weight, bias), whole[start:stop]), (start, stop)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_weight_is_the_matrix_of_its_values(dtype, bits):
    packed = rtn(random(1, 48, 64), bits, 32)
    values = packed.dequantize(torch.float32)
    prepared, x, bias = OPS.prepare(packed), random(2, 5, 64, dtype=dtype), random(3, 48, dtype=dtype)
    dense = OPS.prepare(PackedWeight.dense(values.to(dtype)))
    assert torch.equal(OPS.linear(x, prepared, bias), OPS.linear(x, dense, bias))
    assert torch.equal(OPS.embedding(torch.tensor([3, 0, 47]), prepared), values[[3, 0, 47]])


def test_a_weight_may_have_its_inputs_rounded_to_8_bits():
    packed = rtn(random(1, 48, 64), 8, 64)
    x = torch.cat([random(2, 5, 64) * torch.logspace(-3, 3, 5).unsqueeze(1), torch.zeros(1, 64)])
    for scale in (None, 0.02):
        inputs = InputCodes(None if scale is None else torch.tensor([scale]))
        step = x.abs().amax(1, keepdim=True) / 127 if scale is None else torch.full((6, 1), scale)
        codes = (x.double() / step.clamp(min=1e-30)).round().clamp(-127, 127)
        expected = (codes @ packed.dequantize(torch.float64).T) * step
        found = OPS.linear(x, OPS.prepare(replace(packed, inputs=inputs)))
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert OPS.linear(torch.full((1, 64), torch.nan), OPS.prepare(replace(packed, inputs=InputCodes()))).isnan().all()


def rows_of(batch: AttentionBatch, sequence: int, before: int, start: int, stop: int) -> AttentionBatch:
    """The step that computes the tokens [start, stop) of one sequence, whose first new token is `before`."""
    at = batch.query_starts[sequence] - before
    rows = slice(at + start, at + stop)
    return replace(
        batch,
        positions=batch.positions[rows],
        slots=batch.slots[rows],
        query_starts=(0, stop - start),
        context_lens=(stop,),
        block_tables=batch.block_tables[sequence : sequence + 1],
    )


def chunks(total: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, total)) for start in range(0, total, size)]


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("name", ["fp32", "int4", "k8v4", "fp8_e4m3"])
@pytest.mark.parametrize(("kv_heads", "ratio", "dim"), [(2, 2, 16), (3, 3, 64), (1, 8, 128)])
@pytest.mark.parametrize("window", [None, 50])
def test_attention_is_the_same_in_chunks_of_any_size_and_among_others(name, kv_heads, ratio, dim, window):
    lengths = [(0, 300), (0, 140), (200, 1)]
    it: Scene = scene(layer_plan_of(KV_FORMATS[name], kv_heads, dim), kv_heads, dim, 16, lengths, seed=5)
    shape = AttentionShape(kv_heads * ratio, kv_heads, dim, dim**-0.5, window, 20.0)
    q = random(6, it.tokens, shape.num_heads, dim)
    whole = OPS.attention(q, it.cache, it.batch, shape)
    for sequence, (before, new) in enumerate(lengths):
        for size in (1, 13, 64, 129):
            starts = chunks(new, size) if size > 1 else [(0, 1), (new - 1, new)]
            for start, stop in starts:
                step = rows_of(it.batch, sequence, before, before + start, before + stop)
                at = it.batch.query_starts[sequence]
                rows = slice(at + start, at + stop)
                assert torch.equal(OPS.attention(q[rows], it.cache, step, shape), whole[rows]), (sequence, start, stop)


def test_attention_does_not_see_what_lies_beyond_the_context():
    """Blocks are reused: behind a sequence's last token lies what someone else left there."""
    it = scene(LayerPlan(KV_FORMATS["fp32"]), 2, 16, 16, [(0, 21)], seed=7)
    shape = AttentionShape(4, 2, 16, 0.25)
    q = random(8, 21, 4, 16)
    expected = OPS.attention(q, it.cache, it.batch, shape)
    used = torch.zeros(it.cache.planes["key.data"].shape[0] * 16, dtype=torch.bool)
    used[it.batch.slots] = True
    for plane in it.cache.planes.values():
        plane.masked_fill_(~used.view(-1, 1, 16, 1), 1e30)
    assert torch.equal(OPS.attention(q, it.cache, it.batch, shape), expected)


def test_a_draw_is_the_same_in_any_company():
    logits = random(9, 8, 100) * 3
    params = SamplingBatch(
        torch.tensor([0.0, 0.5, 1.0, 2.0] * 2),
        torch.tensor([0, 5, 0, 50] * 2),
        torch.tensor([1.0, 0.9, 0.5, 1.0] * 2),
        torch.tensor([0.0, 0.0, 0.1, 0.2] * 2),
        torch.rand(8, generator=torch.Generator().manual_seed(10), dtype=torch.float64),
    )
    whole = OPS.sample(logits, params)
    for row in range(8):
        alone = SamplingBatch(*(getattr(params, name)[row : row + 1] for name in SamplingBatch.__dataclass_fields__))
        assert OPS.sample(logits[row : row + 1], alone).tolist() == whole[row : row + 1].tolist()
