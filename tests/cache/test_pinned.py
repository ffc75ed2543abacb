"""Pinning, on a CUDA runtime that only takes notes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvant.cache.pinned import pin_in_place
from kvant.formats.memory import lazy_zeros


class Owner:
    """It keeps memory."""

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory


@pytest.fixture
def runtime(monkeypatch) -> SimpleNamespace:
    noted = SimpleNamespace(pinned={}, code=0)

    def register(address: int, size: int, flags: int) -> int:
        noted.pinned[address] = size
        return noted.code

    calls = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=noted.pinned.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: calls)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return noted


def test_what_is_pinned_is_the_memory_itself_and_no_more_of_it(runtime):
    owner = Owner(lazy_zeros((3, 1000), torch.uint8))
    pin_in_place(owner.memory, owner)
    assert runtime.pinned == {owner.memory.data_ptr(): 3000}
    del owner
    assert not runtime.pinned


def test_memory_that_cannot_be_pinned_says_so(runtime):
    runtime.code = 2
    owner = Owner(torch.zeros(8))
    with pytest.raises(MemoryError, match=r"CUDA refused to pin 32 bytes \(error 2\)"):
        pin_in_place(owner.memory, owner)
