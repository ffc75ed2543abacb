"""Progress of work that takes more than a moment."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def reading_progress(first: str = "loading the model", then: str = "reading") -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal: for what takes unknown time first, then goes on piece by piece."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(first, total=None)
        yield lambda done, total: bar.update(task, description=then, completed=done, total=total)
