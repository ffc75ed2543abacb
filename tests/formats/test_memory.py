"""Memory straight from the system."""

from __future__ import annotations

import mmap

import torch

from kvant.formats.memory import lazy_zeros


def test_a_system_without_huge_pages_gives_small_ones(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345, raising=False)  # madvise refuses what it does not know
    zeros = lazy_zeros((1 << 20, 3), torch.float16)
    assert (zeros.shape, zeros.dtype) == ((1 << 20, 3), torch.float16)
    zeros[-1] = 1
    assert zeros.sum() == 3
