"""Work on pieces of a matrix, spread over threads where there is enough of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

_FEW = 1 << 21  # elements that take less time than starting threads


def for_each(work: Callable[[int], None], pieces: Sequence[int], elements: int, threads: int) -> None:
    """Call `work` for all pieces, in any order; where they are many elements together, on several threads at once."""
    if threads == 1 or elements <= _FEW:
        for piece in pieces:
            work(piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, pieces))
