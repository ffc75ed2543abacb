"""kvant beside llama.cpp, transformers and OpenVINO GenAI on a CPU: tokens per second, one model, one run.

    python benchmarks/cpu/compare.py MODEL.gguf .. --work-dir DIR --out benchmarks/results/cpu/NAME.json

Every peer runs in a process of its own. For each repeat and point all are asked in turn, in an order that rotates, so
that the machine's noise hits them alike. A round before the first repeat warms up and is not counted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import commit, describe_machine
from points import PEERS, Point, Scale, Variant, parse_variants
from protocol import PeerError, Timing, Worker
from report import Figures, Group, Report

from kvant import KvantError
from kvant.errors import ConfigError
from kvant.weights.load import inspect_model
from kvant.weights.locate import locate

POINTS = "decode@0,decode@2048,decode@8192,decode@0x8,prefill@256,prefill@1024"
QUICK_POINTS = "decode@0,decode@64,decode@0x2,prefill@64"
# OpenMP's threads spin for some milliseconds before they sleep; they must not do so into the next peer's time.
SETTLE_SECONDS = 0.1
SEED = 0


@dataclass(frozen=True)
class Plan:
    """What one group measures, and with whom."""

    model: Path
    threads: int
    scale: Scale
    variants: Sequence[Variant]
    repeats: int
    work_dir: Path


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)
    try:
        report = compare(args)
    except (KvantError, OSError) as error:
        sys.exit(f"error: {error}")
    table = report.markdown()
    print(table)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(table, encoding="utf-8")


def compare(args: argparse.Namespace) -> Report:
    """Measure every model on every number of threads; the results file is rewritten after each.

    Raises:
        KvantError: of the kind that names the cause; what was finished before is in the file.
    """
    if args.out.exists():
        raise ConfigError(f"{args.out} exists; name another --out, or delete it")
    plans = _plans(args)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"points": args.points, "tokens": args.tokens, "repeats": args.repeats}
    report = Report(describe_machine(), commit(), settings)
    for plan in plans:
        report.groups.append(measure(plan))
        report.write(args.out)
    return report


def _plans(args: argparse.Namespace) -> list[Plan]:
    """All that the command line asks for; what cannot be is told before anything is measured."""
    for name, usual, quick in (("points", POINTS, QUICK_POINTS), ("tokens", 32, 4), ("repeats", 5, 2)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else usual)
    points = tuple(dict.fromkeys(Point.parse(text) for text in _words(args.points)))
    if not points:
        raise ConfigError("--points names none")
    variants = parse_variants(_words(args.peers))
    plans = []
    for model in args.models:
        spec = inspect_model(locate(model))
        scale = Scale(points, args.tokens, spec.vocab_size, spec.max_position)
        for point in points:
            scale.prompt_tokens(point)
        plans += [Plan(model, threads, scale, variants, args.repeats, args.work_dir) for threads in args.threads]
    return plans


def measure(plan: Plan) -> Group:
    """One group. A variant that fails is left out from there on, with its reason."""
    before = os.getloadavg()[0]
    with ExitStack() as stack:
        team = _Team(plan, stack)
        for repeat in range(plan.repeats + 1):
            for point in plan.scale.points:
                team.measure(point, repeat)
    return Group(
        model=plan.model.stem,
        threads=plan.threads,
        figures=team.figures(),
        details=team.details,
        failed=team.failed,
        load_average=(before, os.getloadavg()[0]),
    )


class _Team:
    """The variants' processes and what they measured; the processes end with the stack."""

    def __init__(self, plan: Plan, stack: ExitStack) -> None:
        self._plan = plan
        self._workers: dict[Variant, Worker] = {}
        self._rates: dict[Point, dict[Variant, list[float]]] = {point: {} for point in plan.scale.points}
        self.details: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        for variant in plan.variants:
            if any(variant.takes(point) for point in plan.scale.points):
                self._start(variant, stack)

    def measure(self, point: Point, repeat: int) -> None:
        """Ask every variant in turn; repeat 0 warms up."""
        turn = list(self._workers)
        first = repeat % max(len(turn), 1)
        for variant in turn[first:] + turn[:first]:
            if not variant.takes(point):
                continue
            try:
                timing = self._ask(variant, point, repeat)
            except PeerError as error:
                self._drop(variant, error)
                continue
            if repeat:
                self._rates[point].setdefault(variant, []).append(timing.rate)
                _say(f"repeat {repeat}, {point.name}, {variant.name}: {timing.rate:.1f} tokens/s")
            time.sleep(SETTLE_SECONDS)

    def figures(self) -> list[Figures]:
        """Of all points, the variants in the plan's order."""
        return [
            Figures(
                point,
                self._plan.scale.prompt_tokens(point),
                {variant.name: rates[variant] for variant in self._plan.variants if variant in rates},
            )
            for point, rates in self._rates.items()
        ]

    def _start(self, variant: Variant, stack: ExitStack) -> None:
        plan = self._plan
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), variant.kind.module]
        log = plan.work_dir / f"{plan.model.stem}-{variant.name.replace(':', '-')}.log"
        worker = stack.enter_context(Worker(command, plan.threads, log))
        self._workers[variant] = worker
        try:
            job = plan.scale.job(str(plan.model), variant, plan.threads, str(plan.work_dir))
            self.details[variant.name] = worker.load(job)
        except PeerError as error:
            self._drop(variant, error)
            return
        _say(f"{plan.model.stem}, {plan.threads} threads: {variant.name} is loaded")

    def _ask(self, variant: Variant, point: Point, repeat: int) -> Timing:
        scale, worker = self._plan.scale, self._workers[variant]
        prompts = point.prompts(scale.prompt_tokens(point), scale.vocab_size, repeat, SEED)
        if point.kind == "prefill":
            return worker.prefill(prompts[0])
        return worker.decode(prompts, variant.tokens(scale.tokens))

    def _drop(self, variant: Variant, error: PeerError) -> None:
        """Without its figures: those of too few repeats would stand beside the others' as if they were whole."""
        _say(f"left out: {variant.name}: {error}")
        self.failed[variant.name] = str(error)
        self._workers.pop(variant).close()
        for rates in self._rates.values():
            rates.pop(variant, None)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL.gguf")
    add("--peers", default=",".join(PEERS), metavar="A,B:KV,..", help="default: %(default)s, all KV caches of each")
    add("--points", metavar="A,B,..", help=f"default: {POINTS}; DEPTHxN decodes N sequences at once")
    add("--threads", type=_numbers, default="1,2", metavar="N,N,..", help="default: %(default)s")
    add("--tokens", type=_positive, help="decoded at each point and repeat; default: 32")
    add("--repeats", type=_positive, help="default: 5")
    add("--quick", action="store_true", help=f"smaller defaults, to see that all works: {QUICK_POINTS}, 4 tokens, 2 x")
    add("--work-dir", required=True, type=Path, metavar="DIR", help="keeps converted models and the peers' logs")
    add("--out", required=True, type=Path, metavar="FILE.json", help="where the results go")
    add("--markdown", type=Path, metavar="FILE.md", help="where to write the tables too")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _numbers(text: str) -> list[int]:
    numbers = [_positive(word) for word in _words(text)]
    if not numbers:
        raise argparse.ArgumentTypeError("names no number")
    return numbers


if __name__ == "__main__":
    main()
