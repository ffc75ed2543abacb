"""`kvant quantize` and `kvant lite`, with a miniature model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvant.kernels.reference import ReferenceOps
from kvant.weights.load import load_model
from tests.engine.checkpoint import write_checkpoint

SMALL = ("--samples", "4", "--seqlen", "32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", intermediate_size=64)


def test_it_tells_what_it_cost_and_writes_a_model(kvant, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = kvant("quantize", str(tiny), "-o", str(out), "--group-size", "16", *SMALL)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "quantization_report.json").read_text())
    for told in (
        f"{report['ppl']:.3f}",
        f"{report['kl']:.4f}",
        "top-1 agreement",
        "of memory at most",
        f"kvant chat {out}",
    ):
        assert told in result.stdout
    assert "layer 2 of 2" in result.stderr
    assert load_model(out, dtype="float32", ops=ReferenceOps()).spec.hidden_size == 32


@pytest.mark.parametrize(
    ("verb", "flags", "method", "format_", "bits"),
    [
        ("auto_awq", ("--w-bits", "4", "--w-group-size", "32"), "awq", "awq", 4),
        ("auto_gptq", ("--w_bits", "8", "--w_group_size", "32", "--w-sym"), "gptq", "gptq", 8),
        ("smooth_quant", (), "smoothquant", "compressed-tensors", 8),
    ],
)
def test_lmdeploys_verbs_do_the_same(kvant, verb, flags, method, format_, bits, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ("--calib-samples", "4", "--calib-seqlen", "32")
    result = kvant("lite", verb, str(tiny), "--work-dir", str(out), *flags, *small)
    assert result.exit_code == 0, result.output
    recipe = json.loads((out / "quantization_report.json").read_text())["recipe"]
    assert (recipe["method"], recipe["format"], recipe["bits"]) == (method, format_, bits)
    assert recipe["symmetric"] == (verb != "auto_awq")
    assert (recipe["samples"], recipe["seqlen"]) == (4, 32)


def test_lite_calibrate_measures_the_cache(kvant, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = kvant(
        "lite", "calibrate", str(tiny), "--work-dir", str(out), "--calib-samples", "1", "--calib-seqlen", "64"
    )
    assert result.exit_code == 0, result.output
    assert (out / "kv_statistics.safetensors").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--calib", "wikitext2"), "downloads no data sets"),
        (("--bits", "3"), "choose 4 or 8"),
        (("--seqlen", "1000"), "longer than the model's context"),
        (("--samples", "100000"), "fewer or smaller windows"),
        (("--ignore", "*"), "nothing to quantize"),
        (("--num-threads", "0"), "at least 1"),
        (("-o", "."), "exists"),
    ],
)
def test_what_cannot_be_done_is_told_before_the_work(kvant, flags, message, tiny: Path, tmp_path: Path) -> None:
    result = kvant("quantize", str(tiny), "-o", str(tmp_path / "out"), *flags)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_goes_on(kvant, tmp_path: Path) -> None:
    """A real process, ended while it works."""
    model, out = write_checkpoint(tmp_path / "deep", num_hidden_layers=16), tmp_path / "out"
    flags = ("quantize", str(model), "-o", str(out), "--group-size", "16", "--samples", "16", "--seqlen", "64")
    script = "from kvant.cli.main import main; main()"
    with subprocess.Popen([sys.executable, "-c", script, *flags], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "layer 1 of 16" in process.stderr.readline()
        process.kill()
    assert not out.exists()
    result = kvant(*flags)
    assert result.exit_code == 0, result.output
    assert "layer 1 of 16" not in result.stderr
    assert "layer 16 of 16" in result.stderr
    assert not (tmp_path / "out.partial").exists()


def test_help_needs_no_torch() -> None:
    code = "import sys; from kvant.cli import quantize, lite; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
