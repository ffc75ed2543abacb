"""Memory straight from the system."""

from __future__ import annotations

import mmap
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

from kvant.formats.memory import Slabs, lazy_zeros


def test_a_system_without_huge_pages_gives_small_ones(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)  # madvise refuses what it does not know
    zeros = lazy_zeros((1 << 20, 3), torch.float16)
    assert (zeros.shape, zeros.dtype) == ((1 << 20, 3), torch.float16)
    zeros[-1] = 1
    assert zeros.sum() == 3


def test_arrays_of_a_slab_lie_side_by_side_and_large_ones_apart():
    slabs = Slabs()
    first, second = slabs.zeros((3, 5), torch.float16), slabs.zeros((7,), torch.int32)
    large, third = slabs.zeros((1 << 24,), torch.uint8), slabs.zeros((1,), torch.uint8)
    arrays = [first, second, large, third]
    for number, array in enumerate(arrays):
        array.fill_(number)
    assert [array.unique().tolist() for array in arrays] == [[0], [1], [2], [3]]
    assert [(second.data_ptr() - first.data_ptr()), third.data_ptr() - second.data_ptr()] == [64, 64]
    assert (first.shape, first.dtype) == ((3, 5), torch.float16)


def test_a_full_slab_is_followed_by_another():
    slabs = Slabs()
    arrays = [slabs.zeros((1 << 22,), torch.uint8) for _ in range(9)]
    assert len({array.untyped_storage().data_ptr() for array in arrays}) == 2
    assert slabs.zeros((0, 4), torch.float32).shape == (0, 4)


def test_threads_that_ask_at_once_get_arrays_of_their_own():
    slabs, interval = Slabs(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet within a call
    try:
        with ThreadPoolExecutor(4) as pool:
            arrays = list(pool.map(lambda _: slabs.zeros((3,), torch.int32), range(2000)))
    finally:
        sys.setswitchinterval(interval)
    assert len({array.data_ptr() for array in arrays}) == 2000
