"""How `compare.py` talks to a peer: a process of its own, asked and answered in JSON, one object a line.

    {"load": {...}}                       -> {"ok": {details}}
    {"prefill": [ids]}                    -> {"ok": {"tokens": n, "seconds": s}}
    {"decode": [[ids], ..], "tokens": n}  -> {"ok": {"tokens": n, "seconds": s}}

or {"error": reason}. A worker that is not asked waits in a read: it takes no CPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

SECONDS_TO_LEAVE = 30.0


class PeerError(Exception):
    """A peer cannot do what it was asked; the message is its reason."""


@dataclass(frozen=True)
class Job:
    """What a peer is loaded for.

    Attributes:
        model: path of a GGUF file.
        kv_cache: the cache's type, by the peer's own name.
        threads: CPU threads.
        work_dir: where converted models are kept.
        max_length: longest sequence, prompt and output.
        max_sequences: at once.
        cache_tokens: tokens of all prompts and outputs that should stay in the cache, each sequence rounded up to 256.
    """

    model: str
    kv_cache: str
    threads: int
    work_dir: str
    max_length: int
    max_sequences: int
    cache_tokens: int

    @property
    def q4_0(self) -> Path:
        """Where the model requantized to Q4_0 is kept; the peer llama.cpp makes it."""
        return Path(self.work_dir) / f"{Path(self.model).stem}-q4_0.gguf"


@dataclass(frozen=True)
class Timing:
    """Tokens, of all sequences together, and the seconds that they took."""

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class Peer(Protocol):
    """A loaded model. Prompts are token ids.

    Attributes:
        details: versions and settings, for the record.
    """

    details: Mapping[str, Any]

    def prefill(self, prompt: list[int]) -> Timing:
        """Compute a prompt that is not in the cache, up to its first output token."""

    def decode(self, prompts: list[list[int]], tokens: int) -> Timing:
        """Prompts of one length, each continued greedily by `tokens` after its first; only these are timed.

        Prompts may be in the cache from the last time, and stay there.
        """


def serve(open_peer: Callable[[Job], Peer]) -> None:
    """The worker's side: answer until stdin ends."""
    answers = _private_stdout()
    peer: Peer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "load" in request:
                peer = open_peer(Job(**request["load"]))
            answer: dict[str, Any] = {"ok": _answer(peer, request)}
        except Exception as error:  # the process is the border: whatever it is, the parent is told
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(peer: Peer | None, request: Mapping[str, Any]) -> Mapping[str, Any]:
    if peer is None:
        raise PeerError("nothing is loaded; send a load first")
    if "load" in request:
        return peer.details
    if "prefill" in request:
        return asdict(peer.prefill(request["prefill"]))
    return asdict(peer.decode(request["decode"], request["tokens"]))


def _private_stdout() -> TextIO:
    """The pipe to the parent; what libraries print to stdout goes to stderr from here on."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


class Worker:
    """The parent's side: a context manager around the process.

    Args:
        command: starts a process that calls `serve`.
        threads: for libraries that take it from the environment.
        log: receives the process's stderr.
    """

    def __init__(self, command: Sequence[str], threads: int, log: Path) -> None:
        self._log = log
        with log.open("w", encoding="utf-8") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, job: Job) -> dict[str, Any]:
        """Load the model; gives the peer's details. Raises PeerError, as do all calls."""
        return self._ask({"load": asdict(job)})

    def prefill(self, prompt: list[int]) -> Timing:
        """See `Peer.prefill`."""
        return Timing(**self._ask({"prefill": prompt}))

    def decode(self, prompts: list[list[int]], tokens: int) -> Timing:
        """See `Peer.decode`."""
        return Timing(**self._ask({"decode": prompts, "tokens": tokens}))

    def close(self) -> None:
        """End the process. May be called again."""
        try:
            self._process.communicate(timeout=SECONDS_TO_LEAVE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            raise self._ended() from None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        ok: dict[str, Any] = answer["ok"]
        return ok

    def _ended(self) -> PeerError:
        self.close()
        return PeerError(f"its process ended with status {self._process.returncode}; {self._log} may say why")
