"""Whether an op is right: run three times on poisoned memory, and held to float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpu.machine import Machine

REPEATS = 3  # an error that moves between runs is a race


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, what torch.empty gives is NaN: an element that no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def compare(
    machine: Machine, run: Callable[[], Tensor], expected: Tensor, whole: float, element: float
) -> Mapping[str, Any]:
    """An op's output beside what it should be, float64 on any device.

    Args:
        machine: where it runs.
        run: the op.
        expected: the truth.
        whole: the largest error allowed on the whole, ‖out - truth‖ / ‖truth‖.
        element: the largest of one element, relative to the truth's root mean square in its row. One wrong row, or one
            wrong group of a row, is within `whole`; it is not within this.
    """
    with poisoned_memory():
        found = [run().double().cpu() for _ in range(1 if machine.small else REPEATS)]
    machine.wait()
    truth = expected.double().cpu()
    errors = [distance(out, truth) for out in found]
    error, worst = max(e for e, _ in errors), max(w for _, w in errors)
    same = all(torch.equal(found[0], other) for other in found[1:])
    return verdict(error <= whole and worst <= element, error, worst, same)


def verdict(right: bool, error: float, worst: float, repeatable: bool) -> Mapping[str, Any]:
    """A check's figures; an error that is not a number is written as 1e30."""
    error, worst = (value if value == value and value < 1e30 else 1e30 for value in (error, worst))
    return {"right": bool(right), "error": error, "worst": worst, "repeatable": repeatable}


def distance(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """The error on the whole and the worst element's, both relative; see `compare`."""
    if found.shape != truth.shape:
        raise ValueError(f"the output is {tuple(found.shape)}, it should be {tuple(truth.shape)}")
    off = found - truth
    rows = truth.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    return float(off.norm() / truth.norm().clamp(min=1e-12)), float((off.abs() / rows).max())
