"""What is done and left out while a model is loaded: the collector, what only compilers need, memory beforehand."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
import threading

import pytest

from kvant.cli import loading
from kvant.cli.chat import _packed_bytes
from kvant.cli.loading import memory_fetched, meta_kernels_left_out, nothing_collected
from kvant.config import EngineConfig


def test_the_collector_rests_and_takes_what_was_made_for_old():
    assert gc.isenabled()
    with nothing_collected():
        assert not gc.isenabled()
        made = [[]]
    assert gc.isenabled()
    assert any(known is made for known in gc.get_objects(generation=2))
    assert gc.get_freeze_count() == 0


def test_the_collector_works_again_after_an_error():
    with pytest.raises(KeyError), nothing_collected():
        raise KeyError
    assert gc.isenabled()


LEFT_OUT = """
import sys
from kvant.cli import loading
loading._KNOWN_TO_START_WITHOUT = {known!r}
with loading.meta_kernels_left_out():
    import torch
assert ("torch._decomp" in sys.modules) == ({known!r} == ())
assert torch.nn.functional.softmax(torch.ones(2, 4) @ torch.ones(4, 3), -1).sum() == 2
import torch._meta_registrations
assert torch._meta_registrations.meta_index_Tensor
from torch.fx.experimental.proxy_tensor import make_fx
graph = make_fx(lambda x, w: torch.nn.functional.gelu(x @ w)[torch.tensor([0, 1])], tracing_mode="fake")
assert "gelu" in graph(torch.ones(2, 4), torch.ones(4, 3)).code
"""


@pytest.mark.parametrize("known", [("",), ()], ids=["known", "unknown"])
def test_what_only_compilers_need_is_imported_when_it_is_asked_for(known):
    ended = subprocess.run([sys.executable, "-c", LEFT_OUT.format(known=known)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_pytorch_is_left_alone_where_it_is_there():
    import torch

    there = torch._meta_registrations
    with meta_kernels_left_out():
        assert sys.modules["torch._meta_registrations"] is there
    assert torch._meta_registrations is there


FETCHED = """
import resource, threading, time
from kvant.cli.loading import memory_fetched
SIZE = 200 << 20
if {limited}:
    resource.setrlimit(resource.RLIMIT_AS, (SIZE, SIZE))
def held():
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize()
before = held()
def grown():
    return held() - before > SIZE / 2
with memory_fetched(SIZE):
    end = time.monotonic() + (1 if {limited} else 60)
    while not grown() and time.monotonic() < end:
        time.sleep(0.01)
    assert grown() != {limited}
assert not grown()
assert threading.active_count() == 1
"""

two_cores = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE") or len(os.sched_getaffinity(0)) == 1, reason="needs Linux and two cores"
)


@two_cores
@pytest.mark.parametrize("limited", [False, True], ids=["there is memory", "the system refuses"])
def test_memory_is_fetched_meanwhile_and_given_back(limited):
    ended = subprocess.run([sys.executable, "-c", FETCHED.format(limited=limited)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr


@two_cores
def test_no_more_memory_is_fetched_once_nobody_waits_for_it(monkeypatch):
    enough, fetched = threading.Event(), []

    def fetch(address: int, value: int, count: int) -> None:
        fetched.append(address)
        if len(fetched) == 3:
            enough.set()

    monkeypatch.setattr(ctypes, "memset", fetch)
    loading._fetch(64 << 20, enough)
    assert fetched == [fetched[0], fetched[0] + (1 << 21), fetched[0] + (2 << 21)]


@two_cores
def test_an_error_meanwhile_is_told_and_ends_the_fetching():
    before = threading.active_count()
    with pytest.raises(KeyError), memory_fetched(64 << 20):
        raise KeyError
    assert threading.active_count() == before


def test_nothing_is_fetched_where_nothing_is_packed(tmp_path):
    """Directories, other formats of weights, devices, and what is no file: the loader tells what is wrong with it."""
    file = tmp_path / "model.gguf"
    file.write_bytes(b"x" * 1000)
    cpu = EngineConfig(device="cpu")
    assert _packed_bytes(str(file), cpu) == 1000
    assert _packed_bytes(str(file), EngineConfig(device="cpu", weights="int4")) == 0
    assert _packed_bytes(str(file), EngineConfig(device="cuda")) == 0
    for name in (str(tmp_path), "org/name", "a" * 300, "nothing.gguf"):
        assert _packed_bytes(name, cpu) == 0
    before = threading.active_count()
    with memory_fetched(0):
        assert threading.active_count() == before
