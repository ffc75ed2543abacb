"""Attention kernels against the reference: every format, every way in which a context can be cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kvant.formats.kv import KV_FORMATS
from kvant.kernels.ops import AttentionBatch, AttentionShape
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.triton import attention_decode, attention_prefill
from kvant.kernels.triton.attention import attention
from kvant.kernels.triton.attention_decode import attention_decode as decode
from kvant.kernels.triton.attention_prefill import attention_prefill as prefill
from kvant.kernels.triton.launch import Config
from kvant.kernels.triton.tuning import Tuning
from tests.formats.stats import layer_plan_of
from tests.kernels.scenes import Scene, scene
from tests.kernels.triton.interpreter import run_assembly

# Contexts that end within the sinks, at a block's edge and behind it; single tokens, prompts, chunks.
MIXED = [(0, 1), (2, 1), (15, 1), (79, 1), (0, 3), (1, 9), (40, 21)]
DECODES = [(0, 1), (3, 1), (15, 1), (16, 1), (130, 1)]
# Largest error relative to the largest element: some roundings of the inputs' type.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}


def made(name: str, dim: int = 64, block_size: int = 16, lengths: list[tuple[int, int]] = MIXED, kv: int = 1) -> Scene:
    """A scene in a format with made-up constants, every slot that no token has full of bits that are not a number."""
    it = scene(layer_plan_of(KV_FORMATS[name], kv, dim), kv, dim, block_size, lengths, seed=1)
    used = torch.zeros(it.cache.planes["key.data" if "key.data" in it.cache.planes else "key.codes"].shape[:3:2]).bool()
    for table, length in zip(it.batch.block_tables, it.batch.context_lens, strict=True):
        numbers = torch.arange(length + it.cache.lead)
        used[table[numbers // block_size], numbers % block_size] = True
    for plane in it.cache.planes.values():
        plane.view(torch.uint8).transpose(1, 2)[~used] = 255
    return it


def check(found: Tensor, q: Tensor, it: Scene, shape: AttentionShape) -> None:
    expected = ReferenceOps().attention(q.float(), it.cache, it.batch, shape)
    error = (found.float() - expected).abs().max()
    assert (found.shape, found.dtype) == (q.shape, q.dtype)
    assert error <= TOLERANCE[q.dtype] * max(float(expected.abs().max()), 1.0)


def attended(it: Scene, dtype: torch.dtype, shape: AttentionShape) -> None:
    """Check what a scene's attention gives; queries lie in a row with other things."""
    generator = torch.Generator().manual_seed(2)
    row = torch.randn(it.tokens, shape.num_heads + 2, shape.head_dim, generator=generator).to(dtype)
    q = row[:, : shape.num_heads]
    check(attention(q, it.cache, it.batch, shape, Tuning()), q, it, shape)


@pytest.mark.parametrize("name", KV_FORMATS)
def test_any_format(name):
    attended(made(name), torch.float32, AttentionShape(2, 1, 64, 0.15))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fp16", "bf16", "int8", "int4", "k8v4", "fp8_e5m2", "int8_pertoken"])
def test_16_bit(name, dtype):
    attended(made(name), dtype, AttentionShape(2, 1, 64, 0.15))


@pytest.mark.parametrize("name", ["bf16", "int8", "int4", "k8v4", "fp8_e4m3", "int8_pertensor", "int4_plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_single_tokens_of_heads_of_their_own(name, dtype):
    attended(made(name, lengths=DECODES), dtype, AttentionShape(1, 1, 64, 0.15, window=50, softcap=20.0))


@pytest.mark.parametrize(
    ("name", "dim", "heads", "kv_heads", "block_size", "window", "softcap"),
    [
        ("fp16", 16, 3, 1, 8, 1, None),
        ("fp16", 256, 2, 2, 64, None, 30.0),
        ("int8", 80, 2, 2, 8, 16, None),
        ("int8", 96, 7, 1, 256, 5, 2.0),
        ("int4", 80, 4, 2, 16, 3, None),
        ("int4", 192, 2, 1, 64, 20, None),
        ("int4", 80, 1, 1, 16, None, None),
        ("k8v4", 96, 2, 2, 32, None, 5.0),
        ("k8v4", 128, 17, 1, 16, 33, None),
        ("int4_plain", 80, 3, 3, 8, None, 2.0),
    ],
)
def test_shapes(name, dim, heads, kv_heads, block_size, window, softcap):
    lengths = [(19, 1), (0, 4), (30, 5)]
    it = made(name, dim, block_size, lengths, kv_heads)
    attended(it, torch.float32, AttentionShape(heads, kv_heads, dim, dim**-0.5, window, softcap))


@pytest.mark.parametrize("name", ["int4", "k8v4", "int8_pertoken", "int4_plain"])
def test_as_devices_unpack_codes(name, monkeypatch):
    run_assembly(monkeypatch)
    monkeypatch.setattr(attention_decode, "interpreted", lambda: False)
    attended(made(name, lengths=DECODES), torch.float16, AttentionShape(3, 1, 64, 0.15))


@pytest.mark.parametrize("name", ["fp16", "int8", "k8v4"])
def test_a_context_in_parts_and_tiles_of_any_size(name):
    it, shape = made(name, lengths=DECODES), AttentionShape(1, 1, 64, 0.15, 100)
    q = torch.randn(it.tokens, 1, 64)
    for tile, splits in ((16, 1), (16, 3), (64, 2), (32, 16)):
        out = torch.full_like(q, float("nan"))
        decode(q, it.cache, it.batch, shape, out, Config({"TILE": tile, "SPLITS": splits}))
        check(out, q, it, shape)


@pytest.mark.parametrize("name", ["fp16", "int4"])
def test_short_contexts_are_in_one_part_where_programs_are_many(name, monkeypatch):
    monkeypatch.setattr(attention_decode, "MULTIPROCESSORS", 0)
    it, shape = made(name, lengths=[(250, 1), (63, 1), (1300, 1), (5, 1)]), AttentionShape(3, 1, 64, 0.15)
    q = torch.randn(it.tokens, 3, 64)
    for tile, splits in ((16, 4), (64, 2), (64, 16)):
        out = torch.full_like(q, float("nan"))
        decode(q, it.cache, it.batch, shape, out, Config({"TILE": tile, "SPLITS": splits}))
        check(out, q, it, shape)


@pytest.mark.parametrize("least", [1, 8])
@pytest.mark.parametrize(("name", "tile"), [("int8", 64), ("int4", 64), ("int8", 32)])
@pytest.mark.parametrize("few", [0, 64], ids=["many at once", "one by one"])
def test_terms_of_the_centre_are_left_for_the_loop(name, tile, few, least, monkeypatch):
    launched: list[dict] = []
    launch = attention_decode.attend_tiles

    class Noting:
        def __getitem__(self, grid):
            def run(**arguments):
                arguments["terms"].fill_(float("nan"))
                launched.append(arguments)
                launch[grid](**arguments)

            return run

    monkeypatch.setattr(attention_decode, "attend_tiles", Noting())
    monkeypatch.setattr(attention_decode, "FEW_TILES", few)
    monkeypatch.setattr(attention_decode, "_least_tiles", lambda programs: least)
    it, shape = made(name, lengths=[(250, 1), (63, 1), (1300, 1)]), AttentionShape(3, 1, 64, 0.15)
    q = torch.randn(it.tokens, 3, 64)
    for splits in (1, 2):
        out = torch.full_like(q, float("nan"))
        decode(q, it.cache, it.batch, shape, out, Config({"TILE": tile, "SPLITS": splits}))
        check(out, q, it, shape)
    assert [arguments["MANY_TERMS"] for arguments in launched] == [few == 0] * 2


def test_too_many_terms_are_not_left_for_the_loop(monkeypatch):
    monkeypatch.setattr(attention_decode, "MOST_TERMS", 100)
    attended(made("int8", lengths=DECODES), torch.float16, AttentionShape(3, 1, 64, 0.15))


def test_groups_that_words_do_not_fill():
    it = made("k8v4", 72, lengths=[(20, 1)])
    with pytest.raises(NotImplementedError, match="72 elements in 4 groups"):
        attended(it, torch.float16, AttentionShape(1, 1, 72, 0.1))


@pytest.mark.parametrize(("rows", "tile", "window"), [(16, 16, 30), (16, 64, 30), (64, 64, 30), (64, 16, None)])
def test_prompts_in_tiles_of_any_size(rows, tile, window):
    """Single tokens too, if they are to be. Every row sees all of some tiles."""
    it, shape = made("int4", lengths=MIXED), AttentionShape(3, 1, 64, 0.15, window)
    q, out = torch.randn(it.tokens, 3, 64), torch.full((it.tokens, 3, 64), float("nan"))
    prefill(q, it.cache, it.batch, shape, out, Config({"ROWS": rows, "TILE": tile}))
    check(out, q, it, shape)


def test_a_batch_whose_lengths_are_overwritten():
    """As in a recorded graph: sizes on the host are those of the longest contexts."""
    it, shape = made("int4", lengths=DECODES), AttentionShape(2, 1, 64, 0.15)
    q, longest = torch.randn(it.tokens, 2, 64), (500,) * len(DECODES)
    recorded = replace(it.batch, context_lens=longest)
    recorded.lengths.copy_(it.batch.lengths)
    check(attention(q, it.cache, recorded, shape, Tuning()), q, it, shape)


@pytest.mark.parametrize("module", [attention_decode, attention_prefill])
def test_candidates_are_configurations_of_their_own(module):
    it, shape = made("int4"), AttentionShape(8, 1, 64, 0.15)
    it, q = replace(it, batch=longer(it.batch)), torch.zeros(it.tokens, 8, 64)
    found = module.candidates(q, it.cache, it.batch, shape)
    assert len(found) == len({str(config) for config in found}) > 2
    assert module.default(q, it.cache, it.batch, shape).blocks.keys() == found[0].blocks.keys()
    assert "h8/1 d64 int4 b16 float32" in module.key(q, it.cache, it.batch, shape)
    keys = [module.key(q.half(), it.cache, batch, shape) for batch in (it.batch, longer(it.batch))]
    # A recorded decode step is launched for the longest context: what it was tuned for must be found all the same.
    assert (keys[0] == keys[1]) == (module is attention_decode)


def longer(batch: AttentionBatch) -> AttentionBatch:
    return replace(batch, context_lens=tuple(100 * length for length in batch.context_lens))
