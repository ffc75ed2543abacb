"""The child's side of sandbox.py: takes a job from stdin, limits itself, runs the program, writes how it ended."""

from __future__ import annotations

import json
import os
import resource
import sys
from types import ModuleType
from typing import Any

OPEN_FILES = 64


def limit(limits: dict[str, Any]) -> None:
    """Bind this process and all that it starts."""
    cpu = limits["cpu_seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))  # SIGXCPU, then SIGKILL for who ignores that
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES,) * 2)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def execute(program: str) -> str:
    """Run the source as the main module; the name of the exception that ended it, or nothing."""
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    try:
        exec(compile(program, "program.py", "exec"), vars(main))  # noqa: S102 - what this process is for
    except BaseException as error:
        return type(error).__name__[:60]
    return ""


def run() -> None:
    """Do the job. Threads and exit handlers that the program left are not waited for."""
    job = json.load(sys.stdin)
    verdict = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    limit(job["limits"])
    outcome = execute(job["program"])
    os.write(verdict, f"{job['token']} {outcome}".encode())
    os._exit(0)


if __name__ == "__main__":
    run()
