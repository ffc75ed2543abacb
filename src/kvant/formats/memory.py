"""Large arrays straight from the system."""

from __future__ import annotations

import contextlib
import mmap
import threading

import numpy as np
import torch
from torch import Tensor

_HUGE_PAGE = 1 << 21
_SLAB = 16 * _HUGE_PAGE
_ALIGNMENT = 64  # of arrays in a slab: a line of the cache


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that the system hands out page by page as they are written, where torch.zeros takes them all at once.

    In huge pages, where the system gives them: reading through much memory then waits less for address translation.

    Raises:
        MemoryError: the system refuses.
    """
    size = max(torch.Size(shape).numel() * dtype.itemsize, 1)
    huge = hasattr(mmap, "MADV_HUGEPAGE") and size >= _HUGE_PAGE
    try:
        memory = mmap.mmap(
            -1, -(-size // _HUGE_PAGE) * _HUGE_PAGE if huge else size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
    except OSError as error:
        raise MemoryError(f"the system refused {size:,} bytes") from error
    if huge:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    data = np.frombuffer(memory, dtype=np.uint8, count=torch.Size(shape).numel() * dtype.itemsize)
    return torch.from_numpy(data).view(dtype).view(shape)


class Slabs:
    """Arrays side by side in huge pages, so that a model's small matrices are read as fast as a large one.

    A slab goes back to the system with the last of its arrays.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `lazy_zeros`."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > _SLAB // 4:
            return lazy_zeros(shape, dtype)
        with self._lock:
            if self._used + size > len(self._slab):
                self._slab, self._used = lazy_zeros((_SLAB,), torch.uint8), 0
            array = self._slab[self._used : self._used + size].view(dtype).view(shape)
            self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
            return array
