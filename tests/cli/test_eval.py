"""`kvant eval` with a miniature model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvant import __version__
from kvant.config import EngineConfig
from kvant.evaluate import perplexity
from tests.engine.checkpoint import write_checkpoint

TEXT = str(Path(__file__).parents[1] / "data" / "truman_1945.txt")
SMALL = ("--text", TEXT, "--windows", "2", "--window-size", "48")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What was asked of a comparison, which then answers with its baseline only."""
    real, calls = perplexity.compare_kv_formats, {}

    def compare(model, formats, **options):
        calls.update(options, model=model, formats=formats)
        return real(model, (), text=Path(TEXT), windows=1, window_size=8)

    monkeypatch.setattr(perplexity, "compare_kv_formats", compare)
    return calls


def test_a_table_on_stdout_and_nothing_on_stderr(kvant, tiny):
    result = kvant("eval", tiny, "--tasks", "ppl", "--kv-cache-dtype", "fp32,int4", *SMALL)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["KV", "auto", "fp32", "int4"]
    assert f"2 x 48 tokens of {Path(TEXT).name}" in result.stdout


def test_the_json_file(kvant, tiny, tmp_path):
    path = tmp_path / "out.json"
    result = kvant("eval", tiny, "--kv-cache-dtype", "int8", "--dtype", "bfloat16", "--json", str(path), *SMALL)
    assert result.exit_code == 0, result.output
    told = json.loads(path.read_text(encoding="utf-8"))
    assert (told["model"], told["text"], told["dtype"]) == (Path(tiny).name, Path(TEXT).name, "bfloat16")
    assert told["engine"] == {"dtype": "bfloat16"}
    assert told["versions"] == {
        "kvant": __version__,
        "torch": torch.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
    }
    auto, int8 = told["rows"]
    assert (auto["kv_cache_dtype"], auto["plan"], auto["kl"], auto["top1"]) == ("auto", "bf16", 0, 1)
    assert int8["kv_cache_dtype"] == "int8"
    assert (
        set(auto)
        == set(int8)
        == {
            *("kv_cache_dtype", "plan", "bits_per_element", "ppl", "ppl_stderr", "ppl_change", "ppl_change_stderr"),
            *("kl", "kl_stderr", "top1", "top1_stderr", "tokens", "windows", "window_size"),
        }
    )
    assert (int8["tokens"], int8["windows"], int8["window_size"]) == (94, 2, 48)
    assert all(isinstance(value, int | float) for name, value in int8.items() if name not in ("kv_cache_dtype", "plan"))


def test_without_flags(kvant, tiny, asked):
    assert kvant("eval", tiny).exit_code == 0
    del asked["progress"]
    assert asked == {
        "model": tiny,
        "formats": ("int8", "int4"),
        "engine": EngineConfig(),
        "text": None,
        "windows": 8,
        "window_size": 1024,
    }


def test_every_flag_arrives(kvant, tiny, asked):
    flags = "--kv-cache-dtype k8v4,,int4,k8v4 --dtype bfloat16 --kv-cache-dtype-skip-layers 0,-1"
    flags += " --weights int4 --weights-group-size 64 --quantization-param-path scales.json --threads 1 --device cpu"
    flags += " --windows 3 --window-size 99"
    result = kvant("eval", tiny, *flags.split(), "--text", TEXT)
    assert result.exit_code == 0, result.output
    assert asked["formats"] == ("k8v4", "", "int4")
    assert asked["engine"] == EngineConfig(
        dtype="bfloat16",
        weights="int4",
        weights_group_size=64,
        kv_cache_dtype_skip_layers=(0, -1),
        quantization_param_path="scales.json",
        num_threads=1,
        device="cpu",
    )
    assert (asked["text"], asked["windows"], asked["window_size"]) == (Path(TEXT), 3, 99)


def test_a_policy_is_measured_alone_unless_formats_are_named(kvant, tiny, asked):
    assert kvant("eval", tiny, "--kv-cache-policy", "p.json").exit_code == 0
    assert (asked["formats"], asked["engine"]) == (("auto",), EngineConfig(kv_cache_policy="p.json"))
    assert kvant("eval", tiny, "--kv-cache-policy", "p.json", "--kv-cache-dtype", "int4,int8").exit_code == 0
    assert asked["formats"] == ("int4", "int8")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--tasks", "ppl,mmlu"], "tasks: 'mmlu' is unknown; there is ppl"),
        (["--kv-cache-dtype", "int8,int3"], "kv_cache_dtype='int3' is unknown"),
        (["--kv-cache-dtype", "int8,"], "kv_cache_dtype='' is unknown"),
        (["--text", "/nowhere/a.txt"], "the text /nowhere/a.txt cannot be read: No such file or directory"),
        (["--windows", "9999"], "the text has "),
        (["--windows", "0"], "windows=0"),
        (["--window-size", "4096"], "window_size=4096 must be from 2 to 512"),
        (["--json", "/nowhere/out.json"], "--json /nowhere/out.json"),
        (["--json", "/"], "--json /"),
        (["--dtype", "int3"], "dtype='int3' is unknown"),
        (["--weights", "int3"], "weights='int3' is unknown"),
        (["--weights", "int4", "--weights-group-size", "64"], "a weight's 32 inputs cannot be cut into groups of 64"),
    ],
)
def test_bad_values_are_one_clean_line(kvant, tiny, flags, complaint):
    result = kvant("eval", tiny, *SMALL, *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {complaint}")
    assert result.stderr.count("\n") == 1


def test_a_file_that_cannot_be_written_after_all(kvant, tiny, tmp_path, monkeypatch):
    """The table is out before it is tried."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    result = kvant("eval", tiny, "--kv-cache-dtype", "fp32", "--json", str(tmp_path / "out.json"), *SMALL)
    assert result.exit_code == 1
    assert "fp32" in result.stdout
    assert result.stderr.endswith("out.json: No space left on device\n")


def test_help_needs_no_torch(kvant):
    script = (
        "import sys; from kvant.cli.main import app; app(['eval', '--help'], standalone_mode=False);"
        "print('loaded', *sorted({'torch', 'numpy', 'rich.progress'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("loaded\n"), done.stdout + done.stderr
    assert "\n  eval " in kvant("--help").stdout
