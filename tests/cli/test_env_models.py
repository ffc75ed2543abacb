"""`kvant env` and `kvant models`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvant import __version__
from kvant.cli.models import needs_of
from kvant.errors import ModelNotFoundError
from kvant.formats.kv import KV_FORMATS
from kvant.weights import locate, pull
from kvant.weights.load import inspect_model


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No pulled models, no hub cache."""
    monkeypatch.setattr(locate, "local_models", list)


def test_env_tells_what_there_is(kvant):
    told = json.loads(kvant("env", "--json").stdout)
    assert told["kvant"] == __version__
    assert told["torch"] == torch.__version__
    assert told["threads"] == torch.get_num_threads()
    assert told["cpu_cores"] >= 1
    assert 0 < float(told["memory_free"].split()[0]) <= float(told["memory_total"].split()[0])
    lines = kvant("env").stdout.splitlines()
    assert [line[:16].strip().replace(" ", "_") for line in lines] == list(told)


def test_env_on_a_machine_without_proc(kvant, monkeypatch, tmp_path):
    monkeypatch.setattr("kvant.cli.env._CPUINFO", tmp_path / "absent")
    told = json.loads(kvant("env", "--json").stdout)
    assert told["cpu"]
    assert told["cpu_features"] == []


def test_env_tells_which_kernels_compute(kvant, monkeypatch):
    told = json.loads(kvant("env", "--json", env={"KVANT_CPU_ISA": ""}).stdout)
    assert told["cpu_isa"] == told["cpu_isas"][0]
    assert told["cpu_isas"][-1] == "reference"
    assert Path(told["native_kernels"]).is_file() == (told["cpu_isa"] != "reference")
    refused = json.loads(kvant("env", "--json", env={"KVANT_CPU_ISA": "reference"}).stdout)
    assert refused["cpu_isa"] == "reference"
    assert all(refused[name] == told[name] for name in ("native_kernels", "cpu_isas"))
    monkeypatch.setattr("kvant.kernels.cpu.library._MODULE", "kvant.kernels.cpu._never_built")
    absent = json.loads(kvant("env", "--json", env={"KVANT_CPU_LIBRARY": "", "KVANT_CPU_ISA": "reference"}).stdout)
    assert "not built. Install a C++ compiler" in absent["native_kernels"]
    assert (absent["cpu_isa"], absent["cpu_isas"]) == ("reference", ["reference"])


def test_env_tells_which_gpus_there_are_or_why_none(kvant, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "none: this PyTorch" in json.loads(kvant("env", "--json").stdout)["gpu"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="NVIDIA Something", major=9, minor=0, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    shown = "NVIDIA Something (compute capability 9.0, 80 GiB)"
    assert json.loads(kvant("env", "--json").stdout)["gpu"] == f"{shown}; {shown}"


def test_models_lists_formats_with_their_bits(kvant, nothing_here):
    formats = json.loads(kvant("models", "--json").stdout)["kv_formats"]
    assert [fmt["name"] for fmt in formats] == list(KV_FORMATS)
    bits = {fmt["name"]: fmt["bits"] for fmt in formats}
    assert (bits["int8"], bits["int4_plain"]) == (8.25, 4.25)
    assert bits["int4"] == pytest.approx(4.25 * (4096 + 12) / 4096)  # its first 4 tokens take 12 slots more
    shown = kvant("models").stdout
    assert "4.25" in shown
    assert "4.26" in shown
    assert all(name in shown for name in KV_FORMATS)


def test_models_tells_what_can_be_fetched(kvant, nothing_here):
    assert "smollm2: not here; `kvant models pull smollm2` fetches it (98 MB)." in kvant("models").stdout


def test_models_lists_what_is_here_and_what_it_needs(kvant, monkeypatch, smollm2):
    model = locate.LocalModel("smollm2", smollm2, smollm2.stat().st_size, "gguf")
    monkeypatch.setattr(locate, "local_models", lambda: [model])
    row = json.loads(kvant("models", "--json").stdout)["models"][0]
    assert (row["name"], row["path"], row["size"]) == ("smollm2", str(smollm2), smollm2.stat().st_size)
    # 30 layers, 3 KV heads of 64; two numbers a vector for scale and zero.
    assert row["needs"]["kv_per_token"] == {"fp16": 30 * 3 * 256, "int8": 30 * 3 * 136, "int4": 30 * 3 * 72}
    assert 134e6 < row["needs"]["weights_16bit"] / 2 < 136e6
    shown = kvant("models").stdout
    assert "22.50 KiB" in shown
    assert "not here" not in shown


def test_needs_agree_with_the_model(smollm2):
    spec, needs = inspect_model(smollm2), needs_of(smollm2)
    assert needs.max_position == spec.max_position
    assert needs.weights_float32 == 2 * needs.weights_16bit


def test_a_model_that_cannot_be_read_does_not_hide_the_others(kvant, monkeypatch, tmp_path):
    broken = tmp_path / f"{'broken' * 20}.gguf"  # wider than a terminal, and still in one piece
    broken.write_bytes(b"not a model")
    monkeypatch.setattr(locate, "local_models", lambda: [locate.LocalModel("broken", broken, 11, "gguf")])
    row = json.loads(kvant("models", "--json").stdout)["models"][0]
    assert row["needs"] is None
    assert row["problem"] in kvant("models").stdout


def test_pull_prints_where_the_model_is(kvant, monkeypatch):
    def fetch(name: str, *, progress):
        if name != "smollm2":
            raise ModelNotFoundError(f"{name} is none")
        progress("fetching")
        return Path("/models/smollm2.gguf")

    monkeypatch.setattr(pull, "pull", fetch)
    done = kvant("models", "pull", "smollm2")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "/models/smollm2.gguf\n", "fetching\n")
    failed = kvant("models", "pull", "other")
    assert (failed.exit_code, failed.stderr) == (1, "error: other is none\n")
