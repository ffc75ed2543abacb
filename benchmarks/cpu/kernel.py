"""How kernels are timed, and the machine's limits that they are set beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

import torch

from kvant.kernels.cpu.native import Native

_READ_BYTES = 256 << 20  # more than any processor's cache
_ROUNDS = 20_000


@dataclass(frozen=True, eq=False)
class Kernel:
    """Something to time.

    Attributes:
        run: does it once.
        units: what a time is given for: `units` of them are done by a run.
        bytes, operations: of a run; two operations a product, and 0 where they are not counted.
        products: what limits the operations, "dot" (8-bit integers) or "fma" (float32).
    """

    run: Callable[[], object]
    units: int
    bytes: int
    operations: int
    products: str


Planned = tuple[str, Callable[[], Kernel]]  # a kernel's name, and what makes its data


@dataclass(frozen=True)
class Timing:
    """A kernel's time, and how near it comes to the limits of one thread; bytes and operations are a run's."""

    name: str
    bytes: int
    operations: int
    ns_per_unit: float
    gb_per_s: float
    gop_per_s: float
    of_reading: float
    of_products: float


def least_seconds(run: Callable[[], object], seconds: float) -> float:
    """The shortest of as many runs as fit in `seconds`, at least 5: other work on the machine only adds."""
    best, end, count = float("inf"), perf_counter() + seconds, 0
    while count < 5 or perf_counter() < end:
        start = perf_counter()
        run()
        best, count = min(best, perf_counter() - start), count + 1
    return best


def measure_limits(native: Native, seconds: float) -> dict[str, float]:
    """Bytes per second that one thread reads from memory, and operations per second on registers, by name."""
    operands, memory = torch.full((64,), 1, dtype=torch.uint8), torch.ones(_READ_BYTES, dtype=torch.uint8)
    limits = {}
    for name, data, count in (("read", memory, _READ_BYTES), ("dot", operands, _ROUNDS), ("fma", operands, _ROUNDS)):
        done = native.reach(name, data, count)
        limits[name] = done / least_seconds(lambda n=name, d=data, c=count: native.reach(n, d, c), seconds)
    return limits


def measure(name: str, kernel: Kernel, limits: Mapping[str, float], seconds: float) -> Timing:
    """The kernel's time beside the limits."""
    kernel.run()
    spent = least_seconds(kernel.run, seconds)
    read, computed = kernel.bytes / spent, kernel.operations / spent
    return Timing(
        name,
        kernel.bytes,
        kernel.operations,
        ns_per_unit=spent * 1e9 / kernel.units,
        gb_per_s=read / 1e9,
        gop_per_s=computed / 1e9,
        of_reading=read / limits["read"],
        of_products=computed / limits[kernel.products],
    )
