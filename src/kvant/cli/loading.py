"""The time between a command and its model's first step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_collected() -> Iterator[None]:
    """For importing and loading, which make many objects and hardly any garbage.

    The collector would go through all of them again and again, for a third of a second with PyTorch's modules alone.
    What is there at the end stays out of its way for good: serving is not held up by it either.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
