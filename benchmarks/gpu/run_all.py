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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAGES = ["correctness", "ceilings", "attention", "linear", "small", "tuning", "engine"]
REPORT_SECONDS = 20
_POLL = 0.2


def main() -> int:
    """Measure, then report on all that is in the directory."""
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    run = time.strftime("%Y%m%d-%H%M%S", time.gmtime(start)) + f"-{os.getpid()}"
    deadline = start + args.budget_minutes * 60 - REPORT_SECONDS
    if args.jobs > 1 and "correctness" in (args.only.split(",") if args.only else STAGES):
        with ThreadPoolExecutor(args.jobs) as pool:  # nothing is timed, and compiling takes most of it
            parts = [f"{index}/{args.jobs}" for index in range(args.jobs)]
            list(pool.map(lambda part: go_on(args, run, deadline, part), parts))
    if not go_on(args, run, deadline):
        return 1
    report = [sys.executable, "-m", "gpu.report", str(args.out)]
    return subprocess.run(report, env=environment(), check=False).returncode


def go_on(args: argparse.Namespace, run: str, deadline: float, part: str = "0/1") -> bool:
    """One process after the other until all is measured; false where one does not even begin, and has said why.

    A part "2/8" is a share of the checks of correctness, for one of several that run side by side.
    """
    current = args.out / ("current.json" if part == "0/1" else f"current-{part.replace('/', '-of-')}.json")
    for _ in range(args.most_crashes):
        arguments = command(args, run, deadline, part, current.name)
        if time.time() > deadline or watch(arguments, current, run, deadline, args.small):
            return True
        if not current.is_file():
            return False
    return True


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
    parser.add_argument("--changed", action="store_true", help="measure again what other code of kvant has measured")
    parser.add_argument("--match", default="", metavar="REGEX", help="measure only what has this in its name")
    parser.add_argument("--small", action="store_true", help="miniature shapes: does everything run?")
    jobs = min(8, (os.cpu_count() or 1) // 2)
    parser.add_argument("--jobs", type=int, default=jobs, help=f"processes that check correctness ({jobs} here)")
    parser.add_argument("--most-crashes", type=int, default=20, help="processes that may crash or hang")
    args = parser.parse_args()
    unknown = set(filter(None, f"{args.only},{args.again}".split(","))) - set(STAGES)
    if unknown:
        parser.error(f"unknown stages: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    return args


def command(args: argparse.Namespace, run: str, deadline: float, part: str, current: str) -> list[str]:
    """The process that measures."""
    flags = [f"--{name}" for name in ("small", "changed") if getattr(args, name)]
    only = args.only if part == "0/1" else "correctness"
    options = ["--run", run, "--deadline", str(deadline), "--only", only, "--again", args.again]
    options += ["--part", part, "--current", current, "--match", args.match]
    return [sys.executable, "-m", "gpu.session", str(args.out), *options, *flags]


def environment() -> dict[str, str]:
    """The checkout's own code before anything that is installed."""
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def watch(arguments: list[str], current: Path, run: str, deadline: float, small: bool) -> bool:
    """Run a process that measures; whether it ended well, or had to end. A crash or a hang becomes a result."""
    current.unlink(missing_ok=True)
    process = subprocess.Popen(arguments, env=environment())
    while process.poll() is None:
        time.sleep(_POLL)
        if time.time() > deadline:
            stop(process)
            return True
        if time.time() > _read(current).get("limit", float("inf")):
            stop(process)
            note(current, run, small, "it hung: it took more than five times as long as it should")
            return False
    if process.returncode:
        note(current, run, small, f"its process ended with status {process.returncode}")
    return process.returncode == 0


def stop(process: subprocess.Popen[bytes]) -> None:
    """End it: politely, then not."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def note(current: Path, run: str, small: bool, error: str) -> None:
    """Write down that the case which runs has failed, unless it has said so itself."""
    found = _read(current)
    path = current.parent / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if not found or any(f'"name": {json.dumps(found["name"])}, ' in line and run in line for line in lines):
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
