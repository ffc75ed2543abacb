"""Which configuration of a kernel is the fastest: every candidate, at the shapes of models.

A module of a kernel that can be tuned has `key`, `default` and `candidates`, which take the same arguments. What a
workload asks of them is seen by standing in for `default`: so nothing here knows how an op comes to its kernels.
"""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from types import ModuleType
from typing import Any
from unittest.mock import patch

from gpu import attention, linear
from gpu.case import Case
from gpu.machine import Machine
from gpu.results import Results, latest
from gpu.timing import measure
from gpu.workload import Build, Workload
from torch import Tensor

import kvant.kernels.triton as kernels
from kvant.kernels.triton.launch import Config
from kvant.kernels.triton.tuning import TABLES, Tuning, card_name

_QUICK, _CAREFUL = 0.02, 0.15  # seconds of a series
_FINALISTS = 3
_GAIN = 1.02  # a default is left for what is so much faster
_WORKERS = 12  # processes that compile at the same time
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
    models = ("llama-2-7b", "llama-3-8b")
    for step in (attention.TARGET, *attention.DECODES[1:4], *attention.PROMPTS[:2]):
        for model in models:
            for fmt in attention.MAIN:
                tags = {"op": "attention", "model": model, "format": fmt, "step": step.name}
                yield tags, partial(attention.build, model, fmt, step)
    for rows in (1, 16, 64, 256, 32, 128, 512):
        for model, shape, fmt in _matrices():
            tags = {"op": "linear", "model": model, "layer": shape.name, "format": fmt, "rows": rows}
            yield tags, partial(linear.build, shape, fmt, rows)


def _matrices() -> Iterator[tuple[str, Any, str]]:
    formats = ("w4", "w8", "w8a8")
    every = [(m, s) for m in linear.MODELS for s in linear.linear_shapes(linear.spec_of(m, False))[:4]]
    yield from ((model, shape, "w4") for model, shape in every)
    yield from ((model, shape, fmt) for fmt in formats[1:] for model, shape in every[:4])


def cases(small: bool) -> list[Case]:
    """First all is compiled, in many processes; then each point is measured alone."""
    compiling = Case("tuning", {"what": "compile"}, _compile_all, 200, lasting=False)
    return [compiling, *(Case("tuning", tags, partial(tuned, build), 20) for tags, build in points(small))]


def tuned(build: Build, machine: Machine) -> Mapping[str, Any]:
    """For each kernel that the workload asks for, the fastest configuration, its time and the default's."""
    work = build(machine)
    with standing() as stands:
        work.calls[0]()
        found = [_tuned_one(machine, work, stand) for stand in stands if stand.asked is not None]
    return {"kernels": found}


def _tuned_one(machine: Machine, work: Workload, stand: Stand) -> Mapping[str, Any]:
    candidates, times, failed = stand.candidates(), {}, 0
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
    arguments = [sys.executable, "-m", "gpu.tune"]
    workers = [subprocess.Popen([*arguments, str(index), str(_WORKERS)]) for index in range(_WORKERS)]
    try:
        return {"workers": _WORKERS, "statuses": [worker.wait() for worker in workers]}
    finally:
        for worker in workers:
            worker.kill()


def compile_share(index: int, workers: int) -> None:
    """Run this worker's share of the candidates of all points."""
    machine = Machine.here(small=False)
    for _, build in points(False):
        with standing() as stands:
            work = build(machine)
            work.calls[0]()
            for stand in stands:
                for config in islice(stand.candidates() if stand.asked else (), index, None, workers):
                    stand.trial = config
                    try:
                        work.calls[0]()
                    except Exception:  # the one who measures counts these
                        machine.wait()
                stand.trial = None


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
    compile_share(int(sys.argv[1]), int(sys.argv[2]))
