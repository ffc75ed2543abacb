"""Which configuration of a kernel is the fastest: every candidate, at the shapes of models.

A module of a kernel that can be tuned has `key`, `default` and `candidates`, which take the same arguments. What a
workload asks of them is seen by standing in for `default`: so nothing here knows how an op comes to its kernels.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor

import kvant.kernels.triton as kernels
from gpu import attention, linear
from gpu.case import Case
from gpu.linear import MODELS
from gpu.machine import Machine
from gpu.results import Record, Results, latest
from gpu.shapes import linear_shapes, spec_of
from gpu.timing import measure
from gpu.workload import Build, Workload
from kvant.kernels.triton.launch import Config
from kvant.kernels.triton.tuning import TABLES, Tuning, card_name

_QUICK, _CAREFUL = 0.02, 0.15  # seconds of a series
_FINALISTS = 3
_SMALL = 2  # candidates that are tried of a miniature
_GAIN = 1.02  # a default is left for what is so much faster
_COMPILE_SECONDS = 150
_WORKERS = 10  # processes that compile at the same time
_TOLERANCE = 0.02


@dataclass
class Stand:
    """Stands in for a module's `default`: gives what is being tried, and notes what it was asked for.

    Attributes:
        trial: given to the first arguments that come; others, and all where it is None, get the default.
        asked: those arguments, and the key that is made of them.
    """

    module: ModuleType
    original: Callable[..., Config]
    trial: Config | None = None
    asked: tuple[str, tuple[Any, ...], Mapping[str, Any]] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Config:
        key = self.module.key(*args, **kwargs)
        if self.asked is None:
            self.asked = (key, args, kwargs)
        return self.trial if self.trial is not None and key == self.asked[0] else self.original(*args, **kwargs)

    @property
    def op(self) -> str:
        """What the table calls it."""
        return self.module.__name__.rpartition(".")[2]

    def candidates(self) -> list[Config]:
        """Of what was asked for, the default first."""
        assert self.asked is not None
        _, args, kwargs = self.asked
        with patch.object(self.module, "default", self.original):
            default, others = self.original(*args, **kwargs), self.module.candidates(*args, **kwargs)
        return [default, *(config for config in others if config != default)]


def tunable_modules() -> Iterator[ModuleType]:
    """Those of kernels that can be tuned."""
    for found in pkgutil.iter_modules(kernels.__path__):
        try:
            module = importlib.import_module(f"{kernels.__name__}.{found.name}")
        except ImportError:  # Triton is not installed
            continue
        if all(callable(getattr(module, name, None)) for name in ("key", "default", "candidates")):
            yield module


@contextmanager
def standing() -> Iterator[list[Stand]]:
    """Stands for all modules, while no table says anything."""
    stands, patches = [], [patch.object(Tuning, "lookup", lambda self, op, key: None)]
    for module in tunable_modules():
        stands.append(Stand(module, module.default))
        patches.append(patch.object(module, "default", stands[-1]))
    for one in patches:
        one.start()
    try:
        yield stands
    finally:
        for one in patches:
            one.stop()


def points(small: bool) -> Iterator[tuple[dict[str, Any], Build]]:
    """What is tuned, and a workload that asks for it; the most valuable first."""
    if small:
        shape = next(iter(linear.points(small)))[1]
        yield {"op": "linear", "layer": "qkv", "format": "w4", "rows": 1}, partial(linear.build, shape, "w4", 1)
        step = attention.Step("decode 2x70", ((2, 69, 1),))
        yield {"op": "attention", "format": "int8"}, partial(attention.build, "llama-2-7b", "int8", step)
        return
    yield from _attention_points((attention.TARGET,))
    yield from _linear_points((1, 16))
    yield from _attention_points((*attention.DECODES[1:4], *attention.PROMPTS[:2]))
    yield from _linear_points((64, 256, 32, 128, 8, 512))


def _attention_points(steps: Sequence[attention.Step]) -> Iterator[tuple[dict[str, Any], Build]]:
    for step in steps:
        for model in ("llama-2-7b", "llama-3-8b"):
            for fmt in attention.MAIN:
                tags = {"op": "attention", "model": model, "format": fmt, "step": step.name}
                yield tags, partial(attention.build, model, fmt, step)


def _linear_points(counts: Sequence[int]) -> Iterator[tuple[dict[str, Any], Build]]:
    every = [(model, shape) for model in MODELS for shape in linear_shapes(spec_of(model, False))[:4]]
    for rows in counts:
        for model, shape, fmt in [
            *((m, s, "w4") for m, s in every),
            *((m, s, f) for f in ("w8", "w8a8") for m, s in every[:4]),
        ]:
            tags = {"op": "linear", "model": model, "layer": shape.name, "format": fmt, "rows": rows}
            yield tags, partial(linear.build, shape, fmt, rows)


def cases(small: bool) -> list[Case]:
    """First all is compiled that is to be measured, in many processes; then each point is measured alone."""
    compiling = Case("tuning", {"what": "compile"}, _compile_all, 200, lasting=False)
    return [compiling, *(_case(tags, build) for tags, build in points(small))]


def _case(tags: Mapping[str, Any], build: Build) -> Case:
    return Case("tuning", tags, partial(tuned, build), 20)


def tuned(build: Build, machine: Machine) -> Mapping[str, Any]:
    """For each kernel that the workload asks for, the fastest configuration, its time and the default's."""
    work = build(machine)
    with standing() as stands:
        work.calls[0]()
        new = [stand for stand in stands if stand.asked and (stand.op, stand.asked[0]) not in machine.tuned]
        found = [_tuned_one(machine, work, stand) for stand in new]
    machine.tuned |= {(one["op"], one["key"]) for one in found}
    return {"kernels": found}


def _tuned_one(machine: Machine, work: Workload, stand: Stand) -> Mapping[str, Any]:
    candidates, times, failed = stand.candidates()[: _SMALL if machine.small else None], {}, 0
    truth = _output(work)
    for index, config in enumerate(candidates):
        stand.trial = config
        try:
            if _far(_output(work), truth):
                raise ValueError("its output is another")
            times[index] = measure(machine, work.calls, _QUICK).us
        except Exception:  # too much shared memory, or what this Triton cannot compile
            failed += 1
            machine.wait()
    finalists = {0, *sorted(times, key=times.__getitem__)[:_FINALISTS]} & times.keys()
    for index in finalists:
        stand.trial = candidates[index]
        times[index] = measure(machine, work.calls, _CAREFUL).us
    stand.trial = None
    best = min(finalists, key=times.__getitem__)
    if 0 in times and times[0] <= _GAIN * times[best]:
        best = 0
    assert stand.asked is not None
    return {
        "op": stand.op,
        "key": stand.asked[0],
        "config": asdict(candidates[best]),
        "us": times[best],
        "default_us": times.get(0),
        "tried": len(candidates),
        "failed": failed,
    }


def _output(work: Workload) -> Tensor:
    found = work.calls[0]()
    return (found if isinstance(found, Tensor) else found[0]).float()


def _far(found: Tensor, truth: Tensor) -> bool:
    return not float((found - truth).norm()) <= _TOLERANCE * float(truth.norm())


def _compile_all(machine: Machine) -> Mapping[str, Any]:
    """Let processes run each candidate once: Triton keeps what they compile, and measuring does not wait for it."""
    if not machine.cuda:
        return {"workers": 0}
    known, end = json.dumps(sorted(machine.tuned)), time.monotonic() + _COMPILE_SECONDS
    command = [sys.executable, "-m", "gpu.tune", str(_WORKERS), known]
    workers = [subprocess.Popen([*command, str(index), machine.match]) for index in range(_WORKERS)]
    while time.monotonic() < end and any(worker.poll() is None for worker in workers):
        time.sleep(0.2)
    statuses = [worker.poll() for worker in workers]
    for worker in workers:
        worker.kill()
        worker.wait()
    return {"workers": _WORKERS, "statuses": statuses}


def compile_share(index: int, workers: int, known: set[tuple[str, str]], match: str) -> None:
    """Run this worker's share of the candidates of all points; what fails is for the one who measures to count."""
    machine = replace(Machine.here(small=False), rotates=False)
    for build in (build for tags, build in points(False) if re.search(match, _case(tags, build).name)):
        with suppress(Exception), standing() as stands:
            work = build(machine)
            work.calls[0]()
            for stand in stands:
                if stand.asked and (stand.op, stand.asked[0]) not in known:
                    known.add((stand.op, stand.asked[0]))
                    _try_each(work, stand, stand.candidates()[index::workers])


def _try_each(work: Workload, stand: Stand, candidates: Sequence[Config]) -> None:
    for config in candidates:
        stand.trial = config
        with suppress(Exception):
            work.calls[0]()
    stand.trial = None


def keys_of(records: Sequence[Record], card: str) -> set[tuple[str, str]]:
    """The (op, key) pairs that were tuned on a card."""
    figures = [r["figures"] for r in records if (r["stage"], r["card"]) == ("tuning", card) and "figures" in r]
    return {(one["op"], one["key"]) for found in figures for one in found.get("kernels", ())}


def write_table(results: Results, machine: Machine) -> None:
    """The table of this card from all results: beside them, and for a real card where the kernels find it."""
    name = f"{card_name(machine.card)}.json"
    known = Tuning.of(machine.card) if machine.cuda else Tuning()
    table = {op: dict(keys) for op, keys in known.configs.items()}
    for record in latest(results.records()):
        if record["stage"] == "tuning" and record["card"] == machine.card and record["small"] == machine.small:
            for kernel in record.get("figures", {}).get("kernels", ()):
                table.setdefault(kernel["op"], {})[kernel["key"]] = Config(**kernel["config"])
    tuning = Tuning(table)
    tuning.write(results.directory / "tuned" / name)
    if machine.cuda and not machine.small:
        tuning.write(TABLES / name)


if __name__ == "__main__":
    workers, known, index, match = sys.argv[1:]
    compile_share(int(index), int(workers), {(op, key) for op, key in json.loads(known)}, match)
