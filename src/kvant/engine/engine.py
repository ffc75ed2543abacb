"""The engine that owns a thread: submit from anywhere, events come back through each request's sink."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import replace

import torch

from kvant.config import SamplingParams
from kvant.engine.core import Core, EngineStats
from kvant.engine.sequence import Failure, Request, Sink, TokenEvent
from kvant.errors import EngineDeadError
from kvant.kernels.device import use_device

logger = logging.getLogger("kvant")

Command = Callable[[], None]


class Engine:
    """Runs a `Core` on its own thread; idle, the thread sleeps."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._gate = threading.Lock()  # no submission slips in between death and burial
        self._live: set[Request] = set()
        self._death: str | None = None
        self._stats = core.stats()
        self._thread = threading.Thread(target=self._loop, name="kvant-engine", daemon=True)
        self._thread.start()

    @property
    def core(self) -> Core:
        """What the engine runs: limits and memory may be read, nothing may be called."""
        return self._core

    def submit(self, prompt: List[int], sampling: SamplingParams, sink: Sink) -> Request:
        """Queue a request; `sink` receives its events on the engine's thread.

        Raises:
            RequestError: it can never be served.
            EngineDeadError: the engine is closed or has failed.
        """
        request = self._core.request(prompt, sampling, sink)
        with self._gate:
            if self._death is not None:
                raise EngineDeadError(f"{self._death}; create a new one")
            self._live.add(request)
            self._command(lambda: self._core.add(request))
        return request

    def abort(self, request: Request, index: int | None = None) -> None:
        """End a request, or one choice of it, soon; its sink still receives the "abort" events."""
        self._command(lambda: self._deliver([(request, event) for event in self._core.abort(request, index)]))

    def stats(self) -> EngineStats:
        """The engine as it was after its last step."""
        return replace(self._stats, healthy=self._death is None)

    def close(self) -> None:
        """Stop the thread; unfinished requests receive a `Failure`."""
        self._command(self._close)
        if threading.current_thread() is not self._thread:  # as it may be when garbage is collected there
            self._thread.join()

    def _command(self, command: Command) -> None:
        self._commands.put(command)
        self._core.interrupt.set()  # after it, so that who sees it finds the command

    def _close(self) -> None:
        self._death = self._death or "the engine is closed"

    @torch.inference_mode()  # here, not for each step: of a small model's, entering it and leaving costs 1%
    def _loop(self) -> None:
        try:
            use_device(self._core.device)
            while self._death is None:
                self._obey()
                if self._death is None and self._core.has_work():
                    self._deliver(self._core.step())
                self._stats = self._core.stats()
        except BaseException as error:
            logger.exception("the engine failed")
            self._death = f"the engine failed: {type(error).__name__}: {error}"
        self._bury()

    def _obey(self) -> None:
        """Carry out commands; with nothing else to do, wait for one."""
        self._core.interrupt.clear()
        idle = not self._core.has_work()
        while idle or not self._commands.empty():
            self._commands.get()()
            idle = False

    def _deliver(self, events: List[tuple[Request, TokenEvent | Failure]]) -> None:
        failed: set[Request] = set()  # whose sinks did, at an earlier token of the same burst
        for request, event in events:
            if request in failed:
                continue
            if not _tell(request, event):
                failed.add(request)
                self._core.abort(request)
            elif isinstance(event, TokenEvent) and event.finish_reason is None:
                continue
            if all(sequence.finish_reason is not None for sequence in request.sequences):
                self._live.discard(request)

    def _bury(self) -> None:
        """Tell everyone who still waits, those included whose requests were never taken in."""
        with self._gate:
            left, self._live = self._live, set()
        for request in left:
            _tell(request, Failure(EngineDeadError(self._death or "the engine is closed")))


def _tell(request: Request, event: TokenEvent | Failure) -> bool:
    """Whether the sink took the event; one that raises must not bring down the others' engine."""
    try:
        request.sink(request, event)
    except Exception:
        logger.exception("a request's sink failed; the request is dropped")
        return False
    return True
