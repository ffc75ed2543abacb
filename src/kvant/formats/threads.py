"""Work spread over threads where there is enough of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")

_FEW = 1 << 21  # elements that take less time than starting threads


def for_each(work: Callable[[int], None], pieces: Sequence[int], elements: int, threads: int) -> None:
    """Call `work` for all pieces, in any order; where they are many elements together, on several threads at once."""
    if threads == 1 or elements <= _FEW:
        for piece in pieces:
            work(piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, pieces))


def map_each(work: Callable[[_Piece], _Result], pieces: Sequence[_Piece], threads: int) -> list[_Result]:
    """What `work` makes of each piece. On several threads at once, each of PyTorch's ops computes on its own alone.

    PyTorch's threads wait for each other after every op: many ops on little data are faster without them. For the time
    of it, threads that use PyTorch first get one thread, too: one caller at a time, before others start to compute.
    """
    if threads == 1:
        return [work(piece) for piece in pieces]
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, pieces))
    finally:
        # What a thread sets holds for itself, and for all that start afterwards.
        torch.set_num_threads(before)
