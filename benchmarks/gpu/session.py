"""Measures what is left, one case after the other, until none is left or the time is up. `run_all.py` watches it."""

from __future__ import annotations

import argparse
import json
import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gpu import attention, ceilings, correctness, correctness_engine, correctness_kv, engine, linear, small_ops, tune
from gpu.case import STAGES, Case
from gpu.machine import Machine
from gpu.results import Results, code_digest

_CURRENT = "current.json"


def all_cases(small: bool) -> list[Case]:
    """In the order of their worth."""
    makers = (correctness, correctness_kv, correctness_engine, ceilings, attention, linear, small_ops, tune, engine)
    found = [case for maker in makers for case in maker.cases(small)]
    return sorted(found, key=lambda case: case.rank)


def left_to_do(
    cases: Sequence[Case], results: Results, machine: Machine, run: str, again: Sequence[str], changed: bool = False
) -> list[Case]:
    """Cases without figures, and those of the stages `again`; what this run has tried is not tried twice.

    Where `changed`, figures of other code do not count. What prepares others is left where one of these is.
    """
    done, tried = results.done(machine.card, machine.small, changed), results.of_run(run)
    untried = [case for case in cases if case.name not in tried]
    useful = {c.stage for c in untried if c.lasting and (c.name not in done or c.stage in again)}
    return [c for c in untried if c.stage in useful and (not c.lasting or c.name not in done or c.stage in again)]


def matching(cases: Sequence[Case], match: str) -> list[Case]:
    """Those with this in their names, and what prepares others; `left_to_do` leaves it where it has none to prepare."""
    return [case for case in cases if not case.lasting or re.search(match, case.name)]


def main() -> None:
    """Measure; the first line says on what."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--run", required=True, help="this run's name in the results")
    parser.add_argument("--deadline", type=float, required=True, help="seconds since the epoch")
    parser.add_argument("--only", default="", help="stages, with commas")
    parser.add_argument("--again", default="", help="stages that are measured again")
    parser.add_argument("--changed", action="store_true", help="figures of other code do not count")
    parser.add_argument("--part", default="0/1", help="i/n: this one of so many shares of the cases")
    parser.add_argument("--current", default=_CURRENT, help="the file in the directory that says which case runs")
    parser.add_argument("--match", default="", help="a regular expression: only cases with this in their names")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    results, machine = Results(args.directory), Machine.here(args.small)
    share, shares = map(int, args.part.split("/"))
    torch.set_num_threads(max(1, torch.get_num_threads() // shares))
    if share == 0 and "environment" not in results.of_run(args.run):
        _append(results, machine, args.run, "environment", "environment", {}, {"figures": machine.describe()})
    only, again = (tuple(filter(None, text.split(","))) for text in (args.only, args.again))
    cases = [case for case in all_cases(args.small) if case.stage in (only or STAGES)]
    cases = matching(cases, args.match)[share::shares]
    stage, left = "", left_to_do(cases, results, machine, args.run, again, args.changed)
    print(f"{len(left)} of {len(cases)} cases are to be measured on {machine.card}", flush=True)
    for case in left:
        if time.time() + (0 if args.small else case.seconds) > args.deadline:
            continue
        if case.stage != stage:
            machine.kept.clear()
            machine, stage = replace(Machine.here(args.small), match=args.match), case.stage  # its ops know the table
            machine.tidy()
            machine.tuned = _tuned(results, machine, args)
        _measure(case, machine, results, args.run, args.current)


def _tuned(results: Results, machine: Machine, args: argparse.Namespace) -> set[tuple[str, str]]:
    """What need not be tuned: what was; only what this run has, or this code, where others do not count."""
    records = [record for record in results.records() if record["small"] == machine.small]
    if "tuning" in args.again:
        records = [record for record in records if record["run"] == args.run]
    elif args.changed:
        records = [record for record in records if record.get("code") == code_digest("tuning")]
    return tune.keys_of(records, machine.card)


def _measure(case: Case, machine: Machine, results: Results, run: str, current_name: str = _CURRENT) -> None:
    """One case, and its line. An error is a result, unless the card cannot go on after it."""
    start = time.time()
    current = {"name": case.name, "stage": case.stage, "tags": dict(case.tags), "card": machine.card}
    limit = start + max(60.0, 5 * case.seconds)
    (results.directory / current_name).write_text(json.dumps({**current, "start": start, "limit": limit}))
    try:
        outcome = {"figures": dict(case.run(machine))}
        machine.wait()
    except Exception as error:
        outcome = {"error": f"{type(error).__name__}: {error}"[:2000]}
        traceback.print_exc()
        machine.kept.clear()
    _append(results, machine, run, case.name, case.stage, dict(case.tags), {**outcome, "seconds": time.time() - start})
    print(f"{case.name}: {_brief(outcome)}", flush=True)
    if "error" in outcome:
        machine.wait()  # after an illegal access nothing works: this ends the process, and another goes on
    elif case.stage == "tuning":
        tune.write_table(results, machine)


def _append(results: Results, machine: Machine, run: str, name: str, stage: str, tags: dict, rest: dict) -> None:
    head = {"name": name, "stage": stage, "tags": tags, "card": machine.card, "small": machine.small, "run": run}
    results.append({**head, "code": code_digest(stage), "seconds": 0.0, **rest})


def _brief(outcome: dict) -> str:
    if "error" in outcome:
        return outcome["error"].splitlines()[0]
    figures = outcome["figures"]
    shown = (
        "right",
        "error",
        "worst",
        "per_second",
        "us",
        "tokens_per_second",
        "output_tokens_per_second",
        "key",
        "peak_bytes",
    )
    parts = [
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in figures.items()
        if key in shown
    ]
    return ", ".join(parts)


if __name__ == "__main__":
    main()
