"""What share of a decode step is spent outside of the native kernels: in Python, PyTorch, the scheduler.

python benchmarks/cpu/overhead.py MODEL [--threads 1] [--sequences 1,8] [--depth 1] [--out RESULTS.json]

The engine's core is stepped by this script, greedily, with weights in int4. Steps come in bursts, so what is outside is
given a step: the time of a burst, less that of the native calls in it, over its steps. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

import torch
from machine import commit, describe_machine

from kvant import EngineConfig, SamplingParams
from kvant.engine.core import Core
from kvant.kernels.cpu.native import Native
from kvant.quantize.load import load_configured
from kvant.weights.load import open_source
from kvant.weights.locate import locate

_WARM = 16  # steps of each sequence that are not counted


@dataclass(frozen=True)
class Overhead:
    """Of a decode step, microseconds; `outside` is what no native call is part of."""

    sequences: int
    threads: int
    step: float
    outside: float
    bursts: int

    @property
    def share(self) -> float:
        """Of the step that is spent outside."""
        return self.outside / self.step


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="as `kvant chat` takes it")
    parser.add_argument("--threads", type=int, default=1, help="of the native kernels (1)")
    parser.add_argument("--sequences", default="1,8", help="that decode together, with commas (1,8)")
    parser.add_argument("--tokens", type=int, default=400, help="of each sequence (400)")
    parser.add_argument("--kv-cache-dtype", default="int4", help="the cache's format (int4)")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for sequences in map(int, args.sequences.split(",")):
        it = measure(core_of(args.model, args.kv_cache_dtype, args.threads, sequences), sequences, args.tokens)
        found.append(Overhead(sequences, args.threads, *it))
        print(f"{sequences} sequences, {args.threads} threads: a step {found[-1].step:.0f} us, outside of native calls "
              f"{found[-1].outside:.0f} us, {found[-1].share:.1%}", flush=True)  # fmt: skip
    if args.out:
        head = {"model": Path(args.model).name, "machine": describe_machine(), "commit": commit()}
        rows = [{**asdict(one), "share": one.share} for one in found]
        args.out.write_text(json.dumps({**head, "overhead": rows}, indent=1) + "\n", encoding="utf-8")


def core_of(model: str, kv: str, threads: int, sequences: int) -> Core:
    """An engine's core, which nobody steps yet."""
    config = EngineConfig(weights="int4", kv_cache_dtype=kv, num_threads=threads, max_num_seqs=sequences)
    return Core(load_configured(open_source(locate(model)), config), config)


def measure(core: Core, sequences: int, tokens: int) -> tuple[float, float, int]:
    """Microseconds of a step, those outside of native calls, and how many bursts there were."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    requests = [core.request([1 + index], sampling, lambda *event: None) for index in range(sequences)]
    for request in requests:
        core.add(request)
    steps, outside = [], []
    with inside_native() as inside:
        while core.has_work():
            before, start = inside[0], perf_counter()
            count = len(core.step()) / sequences
            spent = perf_counter() - start
            if min(len(request.sequences[0].output) for request in requests) > _WARM:
                steps.append(spent / count)
                outside.append((spent - (inside[0] - before)) / count)
    return median(steps) * 1e6, median(outside) * 1e6, len(steps)


@contextmanager
def inside_native() -> Iterator[list[float]]:
    """One number, the seconds that native calls have taken so far."""
    spent, call = [0.0], Native.call

    def timed(self: Native, name: str, *arguments: object) -> bool:
        start = perf_counter()
        try:
            return call(self, name, *arguments)
        finally:
            spent[0] += perf_counter() - start

    with patch.object(Native, "call", timed):
        yield spent


if __name__ == "__main__":
    main()
