"""Comparisons of KV caches, against logits that another way leads to."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from kvant.config import EngineConfig
from kvant.errors import ConfigError
from kvant.evaluate import perplexity
from kvant.evaluate.perplexity import BASELINE, compare_kv, compare_kv_formats
from kvant.evaluate.texts import read_text
from kvant.formats.kv import KVFormat, KVPlan, LayerPlan, resolve_kv_format
from kvant.formats.kv_codecs import AffineCodec, FloatCodec
from kvant.kernels.reference import ReferenceOps
from kvant.models import forcing
from kvant.quantize.texts import cut_windows
from kvant.text.directory import load_tokenizer
from kvant.weights.load import load_model
from tests.engine.checkpoint import overflowing, write_checkpoint
from tests.support import SingleText, model_logits

SIZE = 300  # more than one step and, less the first token, no whole number of logits' rows
PLANS = {
    "fp32": KVPlan.uniform(resolve_kv_format("fp32", torch.float32), 2),
    "fp16": KVPlan.uniform(resolve_kv_format("fp16", torch.float32), 2),
    "bf16": KVPlan.uniform(resolve_kv_format("bf16", torch.float32), 2),
    "int8": KVPlan.uniform(KVFormat("int8", AffineCodec(8), AffineCodec(8), ""), 2),
    "int4": KVPlan.uniform(KVFormat("int4", AffineCodec(4), AffineCodec(4), ""), 2),
    "sinks": KVPlan.uniform(KVFormat("sinks", AffineCodec(8), AffineCodec(4), "", sinks=3), 2),
}


@dataclasses.dataclass(frozen=True)
class BrokenCodec(FloatCodec):
    """Reads nothing but NaN."""

    def decode(self, planes, positions, stats):
        return super().decode(planes, positions, stats) * math.nan


@pytest.fixture(scope="module")
def windows(tiny_path):
    text = read_text(None)[:2000]
    return cut_windows(text, load_tokenizer(tiny_path), 3, SIZE)


@pytest.fixture(scope="module")
def rows(tiny_model, windows):
    return {row.kv_cache_dtype: row for row in compare_kv(tiny_model, PLANS, windows)}


def expectation(logits: list[torch.Tensor], baseline: list[torch.Tensor], windows) -> dict[str, float]:
    """The means by their definitions, from the logits [SIZE, vocab] of each window."""
    nll, kl, agrees = [], [], []
    for found, reference, ids in zip(logits, baseline, windows, strict=True):
        q, p = (x[:-1].double().numpy() for x in (found, reference))
        q, p = (x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in (q, p))
        nll.append(-q[np.arange(SIZE - 1), list(ids[1:])])
        kl.append((np.exp(p) * (p - q)).sum(axis=1))
        agrees.append(p.argmax(axis=1) == q.argmax(axis=1))
    return {"ppl": np.exp(np.mean(nll)), "kl": np.mean(kl), "top1": np.mean(agrees)}


def test_every_number_agrees_with_logits_computed_in_one_step(tiny_path, tiny_model, windows, rows):
    baseline = [model_logits(tiny_path, list(ids), kv_cache_dtype="fp16") for ids in windows]
    for name, plan in PLANS.items():
        texts = [SingleText(tiny_model.decoder, SIZE, SIZE, kv=plan) for _ in windows]
        logits = [text.feed(list(ids)) for text, ids in zip(texts, windows, strict=True)]
        expected = expectation(logits, baseline, windows)
        row = rows[name]
        assert row.ppl == pytest.approx(expected["ppl"], rel=1e-5), name
        assert row.kl == pytest.approx(expected["kl"], rel=1e-3, abs=1e-9), name
        assert row.top1 == pytest.approx(expected["top1"], abs=2.5 / row.tokens), name
        assert row.ppl_change == pytest.approx(row.ppl / rows[BASELINE].ppl - 1, abs=1e-9), name
    assert rows[BASELINE].ppl == pytest.approx(expectation(baseline, baseline, windows)["ppl"], rel=1e-5)


def test_the_baseline_comes_first_and_differs_in_nothing_from_itself(rows):
    first = next(iter(rows.values()))
    assert (first.kv_cache_dtype, first.plan, first.bits_per_element) == (BASELINE, "fp16", 16)
    assert (first.kl, first.kl_stderr, first.top1, first.top1_stderr) == (0, 0, 1, 0)
    assert (first.ppl_change, first.ppl_change_stderr) == (0, 0)
    assert first.ppl_stderr > 0
    assert list(rows) == [BASELINE, *PLANS]


def test_fewer_bits_cost_more(rows):
    assert 0 < rows["fp32"].kl < rows["bf16"].kl < rows["int8"].kl < rows["int4"].kl
    assert rows["fp32"].kl < 1e-4
    assert rows["int4"].top1 < rows["int8"].top1 <= 1
    assert all(row.kl_stderr > 0 for name, row in rows.items() if name not in (BASELINE, "fp16"))


def test_the_same_format_under_another_name_costs_exactly_nothing(rows):
    assert (rows["fp16"].kl, rows["fp16"].ppl, rows["fp16"].top1) == (0, rows[BASELINE].ppl, 1)


def test_bits_are_those_stored_in_a_long_text(tiny_model, rows):
    shape = tiny_model.spec.kv_shape
    assert rows["int4"].bits_per_element == 4 + 32 / shape.head_dim  # a scale and a zero of 16 bits for each vector
    assert rows["sinks"].bits_per_element == PLANS["sinks"].bits_per_element(shape, 4096)
    assert rows["sinks"].bits_per_element > 6 + 32 / shape.head_dim


def test_rows_say_how_much_was_read(rows):
    assert {(row.tokens, row.windows, row.window_size) for row in rows.values()} == {(3 * (SIZE - 1), 3, SIZE)}


def test_a_window_is_a_text_of_its_own(tiny_model, windows, rows):
    """Nothing of one window's cache is left for the next."""
    alone = [compare_kv(tiny_model, {"int4": PLANS["int4"]}, [window])[1] for window in windows]
    assert np.mean([row.kl for row in alone]) == pytest.approx(rows["int4"].kl)
    assert np.std([row.kl for row in alone], ddof=1) / 3**0.5 == pytest.approx(rows["int4"].kl_stderr)


def test_steps_change_nothing(tiny_model, windows, rows, monkeypatch):
    monkeypatch.setattr(forcing, "CHUNK", 17)
    monkeypatch.setattr(perplexity, "_ROWS", 1000)
    row = compare_kv(tiny_model, {"int4": PLANS["int4"]}, windows)[1]
    assert (row.kl, row.ppl) == (pytest.approx(rows["int4"].kl), pytest.approx(rows["int4"].ppl))


def test_a_model_whose_rope_depends_on_the_length(tmp_path):
    """Each window is a prompt, whose length rules all of its tokens."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32}
    path = write_checkpoint(tmp_path, rope_scaling=scaling, max_position_embeddings=32)
    model = load_model(path, dtype="float32", ops=ReferenceOps())
    window = tuple(range(60))
    assert model.spec.length_rope is not None
    nll = torch.nn.functional.cross_entropy(
        model_logits(path, list(window), kv_cache_dtype="fp16")[:-1], torch.tensor(window[1:])
    )
    assert compare_kv(model, {}, [window])[0].ppl == pytest.approx(float(nll.exp()), rel=1e-5)


def test_a_16_bit_model_has_a_baseline_of_its_own_kind(tiny_path, windows):
    model = load_model(tiny_path, dtype="bfloat16", ops=ReferenceOps())
    assert compare_kv(model, {}, windows[:1])[0].plan == "bf16"


def test_progress_counts_windows_times_formats(tiny_model, windows):
    told = []
    compare_kv(tiny_model, {"fp32": PLANS["fp32"]}, windows[:2], lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_a_broken_format_is_a_row_and_no_crash(tiny_model, windows, layers):
    """In the last layer it breaks the logits, before it the keys that are to be stored next."""
    codec = BrokenCodec(torch.float16)
    broken = LayerPlan(KVFormat("broken", codec, codec, ""))
    chosen = tuple(broken if layer in layers else PLANS["fp16"].layers[0] for layer in range(2))
    plans = {"broken": KVPlan("broken", chosen), "int8": PLANS["int8"]}
    baseline, broken, whole = compare_kv(tiny_model, plans, windows[:1])
    assert math.isnan(broken.ppl)
    assert math.isnan(broken.kl)
    assert math.isfinite(baseline.ppl)
    assert math.isfinite(whole.ppl)


def test_a_model_that_overflows_has_no_numbers(tmp_path, windows):
    model = load_model(overflowing(write_checkpoint(tmp_path)), dtype="float16", ops=ReferenceOps())
    rows = compare_kv(model, {"int8": PLANS["int8"]}, windows[:1])
    assert all(math.isnan(row.ppl) for row in rows)


def test_from_a_name_to_the_rows(tiny_path, truman):
    found = compare_kv_formats(tiny_path, ("int8", "auto", "fp32"), text=truman, windows=2, window_size=64)
    assert [row.kv_cache_dtype for row in found.rows] == ["auto", "int8", "fp32"]
    assert (found.model, found.text, found.dtype) == (tiny_path.name, truman.name, "float32")
    assert found.engine == EngineConfig()
    bundled = compare_kv_formats(tiny_path, (), windows=1, window_size=64, engine=EngineConfig(dtype="bfloat16"))
    assert bundled.text.startswith("bundled: ")
    assert [(row.kv_cache_dtype, row.plan) for row in bundled.rows] == [("auto", "bf16")]


def test_an_auto_that_is_not_16_bit_everywhere_is_a_row_beside_the_baseline(tiny_path, truman, monkeypatch):
    """As with a policy that gives some layers other formats."""
    mixed = KVPlan("fp16 (layer 1: int4)", (PLANS["fp16"].layers[0], PLANS["int4"].layers[1]))
    monkeypatch.setattr(perplexity, "plan_kv_cache", lambda config, model, tokenizer: mixed)
    rows = compare_kv_formats(tiny_path, ("auto",), text=truman, windows=1, window_size=64).rows
    assert [(row.kv_cache_dtype, row.plan) for row in rows] == [("auto", "fp16"), ("auto", "fp16 (layer 1: int4)")]
    assert rows[1].kl > 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"formats": ("int3",)}, "kv_cache_dtype='int3' is unknown"),
        ({"windows": 1000}, "enough for 163 windows of 64"),
        ({"windows": 0}, "windows=0"),
        ({"window_size": 513}, "window_size=513 must be from 2 to 512"),
    ],
)
def test_what_cannot_be_measured_is_told_before_weights_are_read(tiny_path, truman, monkeypatch, changes, complaint):
    monkeypatch.setattr(perplexity, "load_configured", lambda *_, **__: pytest.fail("the weights were read"))
    asked = {"formats": ("int8",), "text": truman, "windows": 1, "window_size": 64} | changes
    with pytest.raises(ConfigError, match=complaint):
        compare_kv_formats(tiny_path, **asked)


def test_stored_blocks_are_expanded_so_that_no_rounding_of_activations_is_measured(tiny_path, truman, monkeypatch):
    seen, load = [], perplexity.load_configured
    monkeypatch.setattr(
        perplexity, "load_configured", lambda source, config: seen.append(config.weights) or load(source, config)
    )
    compare_kv_formats(tiny_path, ("int8",), text=truman, windows=1, window_size=64)
    assert seen == ["dense"]
