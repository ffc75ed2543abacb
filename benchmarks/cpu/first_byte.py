"""How long `kvant chat -q` takes to its first byte of an answer, from a cold process.

python benchmarks/cpu/first_byte.py MODEL [--runs 15] [--out RESULTS.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from machine import commit, describe_machine

PROMPT = "Name three colours."
_COMMAND = (sys.executable, "-c", "from kvant.cli.main import main; main()")


def main() -> None:
    """Measure, print the times, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as `kvant chat` takes it")
    parser.add_argument("--runs", type=int, default=15, help="processes, one after the other (15)")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error("--runs must be 1 or more")
    seconds = []
    for _ in range(args.runs):
        seconds.append(first_byte([*_COMMAND, "chat", args.model, "-q", PROMPT, "--max-tokens", "8"]))
        print(f"{seconds[-1]:.2f} s", flush=True)
    print(f"median {median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f}")
    if args.out:
        args.out.write_text(json.dumps(results(args.model, seconds), indent=1) + "\n", encoding="utf-8")


def first_byte(command: list[str]) -> float:
    """Seconds from the start of a process to the first byte of its standard output; it is let to its end.

    Raises:
        SystemExit: it failed, or wrote nothing.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        _, said = process.communicate()
    if process.returncode or not first:
        sys.exit(f"{command} gave no answer (status {process.returncode}):\n{said.decode(errors='replace')[-2000:]}")
    return seconds


def results(model: str, seconds: list[float]) -> dict[str, Any]:
    """The times with what they belong to."""
    versions = {"torch": version("torch"), "commit": commit()}
    return {"model": Path(model).name, "seconds": seconds, "machine": describe_machine(), "versions": versions}


if __name__ == "__main__":
    main()
