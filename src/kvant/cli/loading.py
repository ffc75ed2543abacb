"""The time between a command and its model's first step."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType

_META_KERNELS = "torch._meta_registrations"
_KNOWN_TO_START_WITHOUT = ("2.13.",)  # versions of PyTorch


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
