"""Everything that there is to measure on a GPU, the most valuable first, within a budget of minutes.

    python benchmarks/gpu/run_all.py --out DIR --budget-minutes 9

Each measurement is written to DIR at once; another run with the same DIR goes on where this one stopped. What crashes
or hangs is noted, and the rest goes on in a fresh process. It needs torch, triton, numpy, safetensors and tqdm (the
last two come with transformers); kvant itself need not be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["correctness", "ceilings", "attention", "linear", "small", "tuning", "engine"]
REPORT_SECONDS = 10
_POLL = 0.2


def main() -> int:
    """Measure, then report on all that is in the directory."""
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    run = time.strftime("%Y%m%d-%H%M%S", time.gmtime(start)) + f"-{os.getpid()}"
    deadline = start + args.budget_minutes * 60 - REPORT_SECONDS
    crashes = 0
    while time.time() < deadline and crashes < args.most_crashes:
        if watch(command(args, run, deadline), args.out, run, deadline, args.small):
            break
        if not (args.out / "current.json").is_file():
            return 1  # it did not come to the first case, and has said why
        crashes += 1
    report = [sys.executable, "-m", "gpu.report", str(args.out)]
    return subprocess.run(report, env=environment(), check=False).returncode


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the directory of results")
    parser.add_argument("--budget-minutes", type=float, default=9.0, help="stop after so many minutes (9)")
    parser.add_argument("--only", default="", metavar="STAGES", help=f"some of {','.join(STAGES)}")
    parser.add_argument(
        "--again",
        nargs="?",
        const=",".join(STAGES),
        default="",
        metavar="STAGES",
        help="measure again what is there: all, or these stages",
    )
    parser.add_argument("--small", action="store_true", help="miniature shapes: does everything run?")
    parser.add_argument("--most-crashes", type=int, default=20, help="processes that may crash or hang")
    args = parser.parse_args()
    unknown = set(filter(None, f"{args.only},{args.again}".split(","))) - set(STAGES)
    if unknown:
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    return args


def command(args: argparse.Namespace, run: str, deadline: float) -> list[str]:
    """The process that measures."""
    options = ["--run", run, "--deadline", str(deadline), "--only", args.only, "--again", args.again]
    return [sys.executable, "-m", "gpu.session", str(args.out), *options, *(["--small"] if args.small else [])]


def environment() -> dict[str, str]:
    """The checkout's own code before anything that is installed."""
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def watch(arguments: list[str], out: Path, run: str, deadline: float, small: bool) -> bool:
    """Run a process that measures; whether it ended well, or had to end. A crash or a hang becomes a result."""
    current = out / "current.json"
    current.unlink(missing_ok=True)
    process = subprocess.Popen(arguments, env=environment())
    while process.poll() is None:
        time.sleep(_POLL)
        if time.time() > deadline:
            stop(process)
            return True
        if time.time() > _read(current).get("limit", float("inf")):
            stop(process)
            note(out, run, small, "it hung: it took more than five times as long as it should")
            return False
    if process.returncode:
        note(out, run, small, f"its process ended with status {process.returncode}")
    return process.returncode == 0


def stop(process: subprocess.Popen[bytes]) -> None:
    """End it: politely, then not."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def note(out: Path, run: str, small: bool, error: str) -> None:
    """Write down that the case which runs has failed, unless it has said so itself."""
    found = _read(out / "current.json")
    path = out / "results.jsonl"
    last = path.read_text(encoding="utf-8").splitlines()[-1:] if path.is_file() else []
    if not found or (last and f'"name": {json.dumps(found["name"])}, ' in last[0] and run in last[0]):
        return
    head = {key: found[key] for key in ("name", "stage", "tags", "card")}
    seconds = time.time() - found["start"]
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**head, "small": small, "run": run, "seconds": seconds, "error": error}) + "\n")


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


if __name__ == "__main__":
    sys.exit(main())
