"""The time between a command and its model's first step."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType

_META_KERNELS = "torch._meta_registrations"
_KNOWN_TO_START_WITHOUT = ("2.13.",)  # versions of PyTorch
_HUGE_PAGE = 1 << 21
_MOST_FETCHED = 1 << 29  # more would not come while PyTorch is imported


@contextmanager
def nothing_collected() -> Iterator[None]:
    """For importing and loading, which make many objects and hardly any garbage.

    The collector would go through all of them again and again: PyTorch's modules, then the model's.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Together they put all objects with the oldest, as if they had been gone through.
        gc.freeze()
        gc.unfreeze()
        if before:
            gc.enable()


@contextmanager
def meta_kernels_left_out() -> Iterator[None]:
    """For the first import of PyTorch, of whose time a third goes into what ops do to tensors without memory.

    Only what traces or compiles a model needs that. Such a process is not to be started so: imported later, after
    others of its modules, it may find itself in a circle.
    """
    if "torch" in sys.modules or not version("torch").startswith(_KNOWN_TO_START_WITHOUT):
        yield
        return
    placeholder = sys.modules[_META_KERNELS] = ModuleType(_META_KERNELS)
    try:
        yield
    finally:
        del sys.modules[_META_KERNELS]
        if getattr(sys.modules.get("torch"), "_meta_registrations", None) is placeholder:
            del sys.modules["torch"]._meta_registrations


@contextmanager
def memory_fetched(size: int) -> Iterator[None]:
    """Meanwhile up to so many bytes of huge pages come from the system, which has them back at the end for others.

    In a virtual machine that leaves unused memory to its host, a huge page takes milliseconds at first: as much as
    packing what goes into it. Another core waits for them while this one imports PyTorch.
    """
    if size < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE") or len(os.sched_getaffinity(0)) == 1:
        yield
        return
    enough = threading.Event()
    fetching = threading.Thread(target=_fetch, args=(min(size, _MOST_FETCHED), enough), daemon=True)
    fetching.start()
    try:
        yield
    finally:
        enough.set()
        fetching.join()


def _fetch(size: int, enough: threading.Event) -> None:
    try:
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            first = ctypes.c_char.from_buffer(memory)
            for offset in range(0, size, _HUGE_PAGE):
                if enough.is_set():
                    break
                ctypes.memset(ctypes.addressof(first) + offset, 0, 1)  # while it waits, others may use Python
            del first
    except OSError:  # a kernel without huge pages, or a limit on memory
        return
