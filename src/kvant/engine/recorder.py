"""Making a function on fixed memory repeatable: one launch instead of hundreds.

What is recorded computes on memory that stays where it is, and keeps none of it alive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

Replay = Callable[[], None]


class Recorder(Protocol):
    """Makes a function on fixed memory repeatable."""

    def __call__(self, function: Callable[[], None]) -> Replay:
        """What does the same again, on what the memory then holds."""


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: only one of them runs at a time.

    On one stream, since libraries make a workspace for each stream that they see.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream = torch.cuda.Stream()

    def __call__(self, function: Callable[[], None]) -> Replay:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()  # compiles kernels, and lets libraries make their workspaces
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may load another model meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            function()
        self._pool = self._pool or graph.pool()
        replay: Replay = graph.replay
        return replay
