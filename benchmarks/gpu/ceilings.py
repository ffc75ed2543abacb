"""What the card can do: bytes copied and products a second. All other figures are set beside these."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from gpu.case import Case
from gpu.machine import Machine
from gpu.timing import measure


def cases(small: bool) -> list[Case]:
    """Copying, and matrix products in bfloat16 and int8."""
    tags = ({"what": "copy"}, {"what": "bf16"}, {"what": "int8"})
    runs = (_copy, partial(_product, "bf16"), partial(_product, "int8"))
    return [Case("ceilings", tag, run, 15) for tag, run in zip(tags, runs, strict=True)]


def _copy(machine: Machine) -> Mapping[str, Any]:
    """Bytes read and written a second, device to device: by the driver, or by a kernel, whichever is faster."""
    size = 1 << (20 if machine.small else 31)
    source, target = (machine.random_bytes(size).view(torch.int64) for _ in range(2))
    calls = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    timing = min((measure(machine, [call], 0.5) for call in calls), key=lambda timing: timing.us)
    return {"per_second": 2 * size / timing.us * 1e6, "us": timing.us, "spread": timing.spread}


def _product(kind: str, machine: Machine) -> Mapping[str, Any]:
    """Multiplications and additions a second, square matrices of random numbers."""
    size = 128 if machine.small else 8192
    if kind == "int8":
        a, b = (machine.random_bytes(size, size).view(torch.int8) for _ in range(2))
        timing = measure(machine, [lambda: torch._int_mm(a, b.T)], 1.0)
    else:
        x, y = (machine.random(size, size, dtype=torch.bfloat16) for _ in range(2))
        timing = measure(machine, [lambda: x @ y.T], 1.0)
    return {"per_second": 2 * size**3 / timing.us * 1e6, "us": timing.us, "spread": timing.spread}
