"""What people and programs are told of a comparison."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from rich.console import Console

from kvant.config import EngineConfig
from kvant.evaluate.perplexity import Comparison
from kvant.evaluate.report import as_json, notes, table
from kvant.evaluate.rows import Row

AUTO = Row("auto", "fp16", 16.0, 22.5, 0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 510, 2, 256)
INT4 = Row("int4", "int4 (layer 0: fp16)", 4.25, 23.625, 0.75, 0.05, 0.0125, 0.0123, 0.0004, 0.925, 0.005, 510, 2, 256)
BROKEN = dataclasses.replace(INT4, kv_cache_dtype="int2", plan="int2", ppl=math.nan, ppl_stderr=math.inf, kl=math.nan)


def comparison(*rows: Row, **engine) -> Comparison:
    return Comparison("smollm2", "a.txt", EngineConfig(**engine), "float32", (AUTO, *rows))


def drawn(*rows: Row) -> list[list[str]]:
    """The table's lines, cut at two spaces."""
    out = io.StringIO()
    Console(file=out, width=200).print(table(comparison(*rows)))
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.getvalue().splitlines()]


def test_the_table():
    heading, auto, int4 = drawn(INT4)
    assert heading == ["KV cache", "bits", "perplexity", "change", "KL (nats)", "top-1"]
    assert auto == ["auto (fp16)", "16.00", "22.50 ± 0.50"]
    assert int4 == [
        *("int4 (layer 0: fp16)", "4.25", "23.62 ± 0.75"),
        *("+5.00% ± 1.25%", "1.2e-02 ± 4e-04", "92.5% ± 0.5%"),
    ]


def test_what_is_not_finite_is_shown_and_told():
    assert drawn(BROKEN)[2][2] == "nan ± inf"
    assert "not finite with: int2" in notes(comparison(INT4, BROKEN))[-1]
    assert not any("not finite" in line for line in notes(comparison(INT4)))


def test_the_notes_say_what_was_read():
    assert notes(comparison(INT4))[0] == "smollm2 in float32; 2 x 256 tokens of a.txt"
    assert notes(comparison(weights="int4"))[0].startswith("smollm2 with int4 weights in float32; ")


def test_json_has_every_number_and_what_it_was_measured_on():
    told = as_json(comparison(INT4, dtype="float32", num_threads=2), {"kvant": "1"})
    assert {key: value for key, value in told.items() if key != "rows"} == {
        "model": "smollm2",
        "text": "a.txt",
        "dtype": "float32",
        "engine": {"dtype": "float32", "num_threads": 2},
        "versions": {"kvant": "1"},
    }
    assert told["rows"] == [dataclasses.asdict(AUTO), dataclasses.asdict(INT4)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_stays_json(value):
    row = dataclasses.replace(INT4, ppl=value)
    told = json.loads(json.dumps(as_json(comparison(row), {}), allow_nan=False))
    assert told["rows"][1]["ppl"] is None
    assert told["rows"][1]["kl"] == INT4.kl
