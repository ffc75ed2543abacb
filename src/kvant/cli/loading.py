"""The time between a command and its model's first step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
