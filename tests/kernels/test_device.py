"""What a machine with, without, or with the wrong GPU says; PyTorch's answers are made up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvant.errors import ConfigError
from kvant.kernels import device as devices
from kvant.kernels import select as selection
from kvant.kernels.device import check_triton, find_device, runs_triton
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.select import select_ops

CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes PyTorch believe in a machine, and gives the devices that become the current one."""

    def make(*, built="13.0", usable=True, says=None, gpus=1, capability=(9, 0), driver=False):
        def init():
            if says is not None:
                raise RuntimeError(says)

        monkeypatch.setattr(torch.version, "cuda", built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: built is not None and usable)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Something")
        version = Path(tmp_path, "version")
        if driver:
            version.touch()
        monkeypatch.setattr(devices, "_NVIDIA_DRIVER", version)
        monkeypatch.setattr(selection, "check_triton", lambda: None)
        chosen = []
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return make


def test_cpu_asks_nothing_of_a_gpu(machine):
    machine(usable=False, says="broken")
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_works_is_taken(machine, name):
    machine()
    assert find_device(name) == CUDA
    assert runs_triton(CUDA)


@pytest.mark.parametrize(("version", "runs"), [("3.5.1", False), ("3.6.0", True), ("3.10.0+git1", True)])
def test_an_old_triton_is_left_alone(machine, monkeypatch, caplog, version, runs):
    machine()
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    assert runs_triton(CUDA) == runs
    assert ("Triton is 3.5.1, its kernels need 3.6" in caplog.text) != runs


def test_auto_takes_the_cpu_where_there_is_no_gpu(machine, caplog):
    machine(usable=False)
    assert find_device("auto") == torch.device("cpu")
    assert not caplog.records


def test_auto_says_why_a_gpu_with_its_driver_is_left_alone(machine, caplog):
    machine(built=None, driver=True)
    assert find_device("auto") == torch.device("cpu")
    assert "the CPU computes: this PyTorch" in caplog.text
    assert "built without CUDA" in caplog.text


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"built": None}, r"built without CUDA; install a build with it"),
        (
            {"usable": False, "says": "The NVIDIA driver on your system is too old (found version 11040)."},
            r"needs a driver for CUDA 13\.0.*too old \(found version 11040\).*update the driver",
        ),
        ({"usable": False}, r"finds no GPU; `nvidia-smi`.*CUDA_VISIBLE_DEVICES"),
        ({"capability": (6, 1)}, r"compute capability 6\.1; 7\.0 is the least"),
    ],
    ids=["cpu-build", "old-driver", "no-gpu", "old-gpu"],
)
def test_a_gpu_that_was_asked_for_and_cannot_be_used_is_refused_with_the_reason(machine, answers, message):
    machine(**answers)
    with pytest.raises(ConfigError, match=message) as raised:
        find_device("cuda")
    assert "cpu" in str(raised.value)


def test_a_number_beyond_the_gpus_is_refused(machine):
    machine(gpus=2)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"device='cuda:2': there are 2 GPUs"):
        find_device("cuda:2")


@pytest.mark.parametrize("name", ["tpu", "cuda:", "cuda:x", "", "CPU"])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(ConfigError, match=r"is unknown; use 'cpu', 'cuda'"):
        find_device(name)


def test_older_gpus_compute_with_the_reference_and_are_told_so(machine, caplog):
    machine(capability=(7, 5))
    ops = select_ops("cuda")
    assert type(ops) is ReferenceOps
    assert ops.device == CUDA
    assert "slowly: its compute capability is 7.5, Triton's kernels need 8.0" in caplog.text


def test_without_triton_the_reference_computes(machine, monkeypatch, caplog):
    machine()
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    assert type(select_ops("cuda")) is ReferenceOps
    assert "pip install kvant[gpu]" in caplog.text


def test_a_gpu_that_is_named_becomes_the_threads_current_one(machine):
    told = machine(gpus=2)
    assert select_ops("cuda:1").device == torch.device("cuda", 1)
    assert told == [torch.device("cuda", 1)]


def test_newer_gpus_compute_with_triton(machine):
    machine()
    ops = select_ops("auto")
    assert (ops.name, ops.device) == ("triton", CUDA)


def test_a_triton_that_cannot_launch_is_told_with_the_remedy(monkeypatch):
    driver = pytest.importorskip("triton.runtime").driver

    class Bare:
        def get_current_device(self):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(driver, "_active", Bare())
    with pytest.raises(ConfigError, match=r"Failed to find C compiler\..*packages gcc and python3-dev"):
        check_triton()
