"""What a quantized KV cache costs on tasks that are generated: HumanEval (pass@1) and GSM8K (exact match).

    python benchmarks/kv/tasks.py MODEL --task humaneval --data humaneval.jsonl --out benchmarks/results/kv/NAME.json

Each format answers the same problems, greedily and in one batch. Its answers are judged one by one, and compared with
those of the 16-bit cache ("auto") pair by pair. The results are written after every format; --resume continues a file.

HumanEval executes what the model wrote: in processes of their own, under limits, never in this one. Against malice that
is no wall (sandbox.py says more): score models that you do not trust in a container.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from gsm8k import read_gsm8k
from humaneval import STOP, read_humaneval
from problems import Problem
from results import FormatRun, Results

import kvant
from kvant import EngineConfig, KvantError, Pipeline, Response, SamplingParams, pipeline
from kvant.errors import ConfigError
from kvant.formats.kv import resolve_kv_format

SECONDS_BETWEEN_REPORTS = 30.0


@dataclass(frozen=True)
class Task:
    """A kind of problem: how to read it (path, count, shots), and how much an answer may take."""

    read: Callable[[Path, int | None, int], Sequence[Problem]]
    max_tokens: int
    stop: tuple[str, ...] = ()
    shots: int | None = None


TASKS = MappingProxyType(
    {
        "humaneval": Task(lambda path, count, _: read_humaneval(path, count), max_tokens=384, stop=STOP),
        "gsm8k": Task(read_gsm8k, max_tokens=320, shots=4),
    }
)


@dataclass(frozen=True)
class Run:
    """What all formats have in common."""

    model: str
    problems: Sequence[Problem]
    sampling: SamplingParams
    engine: dict[str, Any]
    answers: Path | None


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = _parser().parse_args(argv)
    try:
        results = score(args)
    except (KvantError, OSError) as error:
        sys.exit(f"error: {error}")
    table = results.markdown()
    print(table)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(table, encoding="utf-8")


def score(args: argparse.Namespace) -> Results:
    """Score every format that the results file does not hold yet; the file is rewritten after each.

    Raises:
        KvantError: of the kind that names the cause; what was finished before is in the file.
    """
    formats = _formats(args.kv_cache_dtype)
    run = _run_of(args)
    results = _open_results(args, run)
    for name in formats:
        if name in results.runs:
            _say(f"{name}: already in {args.out}")
            continue
        results.runs[name] = _score_format(name, run)
        results.write(args.out)
        _say(f"{name}: {results.runs[name].score:.1%} of {len(run.problems)}")
        gc.collect()  # the model, before the next one is loaded
    return results


def _score_format(name: str, run: Run) -> FormatRun:
    with pipeline(run.model, engine=EngineConfig(kv_cache_dtype=name, **run.engine)) as pipe:
        memory = pipe.memory
        started = time.perf_counter()
        with _progress(name, pipe):
            responses = pipe([problem.messages for problem in run.problems], run.sampling)
        seconds = time.perf_counter() - started
    outcomes = [problem.judge(response.text) for problem, response in zip(run.problems, responses, strict=True)]
    if run.answers is not None:
        _write_answers(run.answers / f"{name}.jsonl", run.problems, responses, outcomes)
    return FormatRun(
        stored_as=memory.plan.name,
        bytes_per_token=memory.bytes_per_token,
        outcomes=tuple(outcomes),
        digests=tuple(_digest(response.token_ids)[:16] for response in responses),
        generated_tokens=sum(response.usage.completion_tokens for response in responses),
        cut_off=sum(response.finish_reason == "length" for response in responses),
        seconds=seconds,
        versions=_versions(),
    )


def _run_of(args: argparse.Namespace) -> Run:
    task = TASKS[args.task]
    if args.shots is not None and task.shots is None:
        raise ConfigError(f"--shots: {args.task} takes no worked examples")
    shots = args.shots if args.shots is not None else task.shots or 0
    return Run(
        model=args.model,
        problems=task.read(args.data, args.problems, shots),
        sampling=SamplingParams(temperature=0, max_tokens=args.max_tokens or task.max_tokens, stop=task.stop),
        engine={"dtype": args.dtype, "max_num_seqs": args.max_num_seqs, "num_threads": args.threads},
        answers=args.answers,
    )


def _open_results(args: argparse.Namespace, run: Run) -> Results:
    header = _header(args, run)
    if not args.out.exists():
        args.out.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after the first format
        return Results(header)
    if not args.resume:
        raise ConfigError(f"{args.out} exists; continue it with --resume, name another --out, or delete it")
    results = Results.read(args.out)
    changed = [key for key in {**header, **results.header} if header.get(key) != results.header.get(key)]
    if changed:
        raise ConfigError(f"{args.out} was written with another {', '.join(changed)}; name another --out, or delete it")
    return results


def _header(args: argparse.Namespace, run: Run) -> dict[str, Any]:
    """What two runs must share to be compared. The prompts stand for data, selection and wording."""
    return {
        "model": Path(args.model).name if Path(args.model).exists() else args.model,
        "task": args.task,
        "settings": {
            "dtype": args.dtype,
            "max_tokens": run.sampling.max_tokens,
            "max_num_seqs": args.max_num_seqs,
            "stop": list(run.sampling.stop_strings),
            "prompts_sha256": _digest([problem.messages for problem in run.problems]),
        },
        "problems": [problem.name for problem in run.problems],
    }


def _formats(text: str) -> list[str]:
    """The names in a comma-separated list; a wrong one is told before hours are spent on the others."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError("--kv-cache-dtype names no format")
    for name in names:
        resolve_kv_format(name, torch.float32)
    return names


@contextmanager
def _progress(name: str, pipe: Pipeline) -> Iterator[None]:
    """Lines that tell how far the batch is, where no terminal shows the pipeline's own progress bar."""
    done = threading.Event()
    started = time.perf_counter()

    def report() -> None:
        while not done.wait(SECONDS_BETWEEN_REPORTS):
            stats = pipe.stats()
            _say(f"{name}: {stats.running} running, {stats.waiting} waiting, {time.perf_counter() - started:.0f} s")

    reporter = threading.Thread(target=report, daemon=True)
    if not sys.stderr.isatty():
        reporter.start()
    try:
        yield
    finally:
        done.set()
        if reporter.ident is not None:
            reporter.join()


def _write_answers(
    path: Path, problems: Sequence[Problem], responses: Sequence[Response], outcomes: Sequence[str]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for problem, response, outcome in zip(problems, responses, outcomes, strict=True):
            file.write(json.dumps({"problem": problem.name, "outcome": outcome, "answer": response.text}) + "\n")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _versions() -> dict[str, str | None]:
    return {
        "kvant": kvant.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }


def _commit() -> str | None:
    """The commit of the source tree, marked where files differ from it; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="anything kvant opens that has a chat template")
    add("--task", required=True, choices=sorted(TASKS))
    add("--data", required=True, type=Path, metavar="FILE", help="the task's problems, as JSON lines")
    add("--problems", type=_positive, metavar="N", help="how many, evenly spaced over the data; default: all")
    add("--shots", type=int, help="worked examples before each problem (gsm8k; default 4)")
    add("--kv-cache-dtype", default="auto,int8,int4", metavar="A,B,..", help="default: %(default)s")
    add("--dtype", default="float32", help="of weights and activations; default: %(default)s")
    add("--max-num-seqs", type=_positive, default=32, help="problems that run at once; default: %(default)s")
    add("--max-tokens", type=_positive, help="of an answer; default: 384 for humaneval, 320 for gsm8k")
    add("--threads", type=_positive, help="CPU threads; default: PyTorch's choice")
    add("--out", required=True, type=Path, metavar="FILE.json", help="where the results go")
    add("--resume", action="store_true", help="keep the formats that --out holds, and run the others")
    add("--markdown", type=Path, metavar="FILE.md", help="where to write the table too")
    add("--answers", type=Path, metavar="DIR", help="keep the answers here, a file per format")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


if __name__ == "__main__":
    main()
