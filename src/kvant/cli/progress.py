"""Progress of work that takes more than a moment."""

from __future__ import annotations

import sys
import time
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


@contextmanager
def layer_progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with the time that is left; where that is no terminal, a line for each layer."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("layers"))
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    with Progress(
        *columns, *times, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("reading the model", total=None)
        begun = time.monotonic()
        first: list[int] = []

        def show(done: int, total: int) -> None:
            first.append(done)
            bar.update(task, description="quantizing", completed=done, total=total)
            if bar.disable and done > first[0]:
                left = (time.monotonic() - begun) / (done - first[0]) * (total - done)
                print(f"layer {done} of {total}, about {left:.0f} s left", file=sys.stderr)  # noqa: T201

        yield show
