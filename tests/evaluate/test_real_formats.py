"""What each format costs a real model under teacher forcing, with the statistics that kvant measures by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvant.evaluate.perplexity import compare_kv_formats
from kvant.evaluate.rows import Row
from kvant.formats.kv import KV_FORMATS

# Mean KL from a 16-bit cache in nats, and the share of likeliest tokens that stay: twice what was measured, or more.
BOUNDS = {
    "fp32": (1e-5, 0.998),
    "fp16": (0.0, 1.0),
    "bf16": (1e-4, 0.99),
    "int8": (0.0005, 0.98),
    "int8_plain": (0.001, 0.98),
    "int8_pertoken": (0.002, 0.96),
    "int8_pertensor": (0.004, 0.96),
    "int8_pertensor_perhead": (0.003, 0.96),
    "k8v4": (0.01, 0.93),
    "int4": (0.02, 0.92),
    "fp8_e4m3": (0.007, 0.94),
    "fp8_e5m2": (0.03, 0.90),
    "int4_plain": (0.3, 0.75),
}


def compared(model: Path, text: Path, formats: tuple[str, ...], tokens: int) -> dict[str, Row]:
    """The rows by format, that of "auto" among them, over one window of a text."""
    rows = compare_kv_formats(model, formats, text=text, windows=1, window_size=tokens).rows
    assert 10 < rows[0].ppl < 60
    return {row.kv_cache_dtype: row for row in rows}


def check(rows: dict[str, Row]) -> None:
    for name, row in rows.items():
        if name != "auto":
            most, kept = BOUNDS[name]
            assert row.kl <= most, name
            assert row.top1 >= kept, name
            assert row.ppl == pytest.approx(rows["auto"].ppl, rel=4 * most**0.5 + 1e-6), name
    assert rows["int8"].kl < rows["int4"].kl
    assert rows["int4_plain"].kl > 3 * rows["int4"].kl, "measuring and sinks are hardly worth their while"


def test_the_usual_formats(smollm2, truman):
    rows = compared(smollm2, truman, ("int8", "int4", "int4_plain"), tokens=200)
    check(rows)
    assert rows["int4"].bits_per_element < 4.6
    assert rows["int8"].bits_per_element < 8.6


@pytest.mark.slow
def test_every_format(smollm2, truman):
    check(compared(smollm2, truman, tuple(KV_FORMATS), tokens=512))
