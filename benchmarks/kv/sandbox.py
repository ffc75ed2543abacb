"""Runs a program that a model wrote, in a process of its own and under limits, and says how it ended.

The program gets a fresh Python with the standard library alone (no installed packages), an environment and a temporary
directory of its own, no input, no output, and limits on CPU time, memory, file size, open files and new processes (the
last does not bind root); then the wall clock. Whatever it started is killed at its end.

This guards against accidents: endless loops, memory hogs, output floods, early exits. It is no wall against malice: the
program runs as you, may read what you may read, and nothing here cuts it off from the network. Score models that you do
not trust in a container or a virtual machine.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from problems import PASSED

RUNNER = Path(__file__).with_name("sandbox_runner.py")
_VERDICT_BYTES = 4096
# What `-I` says, less its deafness to PYTHONHASHSEED: the order of a set must not decide whether a program passes.
# `-S` leaves out site-packages, which differ from machine to machine.
_ISOLATED = ("-P", "-s", "-S", "-B")


@dataclass(frozen=True)
class Limits:
    """What a program may use. The wall clock is lax, since a busy machine must not decide who passes."""

    cpu_seconds: int = 10
    wall_seconds: float = 60.0
    memory_bytes: int = 2**30
    file_bytes: int = 2**20


_USUAL = Limits()


def run_program(program: str, limits: Limits = _USUAL) -> str:
    """Execute Python source.

    Returns:
        `PASSED` if it ran to its end; the name of the exception that ended it, such as AssertionError or SystemExit;
        "timeout"; "died" if the process vanished without a word.
    """
    token = secrets.token_hex(8)  # a program that prints or exits cannot say "passed" by accident
    job = json.dumps({"program": program, "token": token, "limits": asdict(limits)})
    # A program's output goes nowhere; the verdict goes to a file, which the file limit keeps small.
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as verdict:
        status = _execute(job, directory, verdict, limits.wall_seconds)
        verdict.seek(0)
        written = verdict.read(_VERDICT_BYTES).decode(errors="replace")
    if status is None or status == -signal.SIGXCPU:
        return "timeout"
    heading, _, outcome = written.partition(" ")
    if status != 0 or heading != token:
        return "died"
    return outcome or PASSED


def _execute(job: str, directory: str, verdict: IO[bytes], wall_seconds: float) -> int | None:
    """The exit status; None if the time was up. Nothing of the process's group survives."""
    process = subprocess.Popen(
        [sys.executable, *_ISOLATED, str(RUNNER)],
        stdin=subprocess.PIPE,
        stdout=verdict,
        stderr=subprocess.DEVNULL,
        cwd=directory,
        env={"HOME": directory, "TMPDIR": directory, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        start_new_session=True,
    )
    try:
        process.communicate(job.encode(), timeout=wall_seconds)
        return process.returncode
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
