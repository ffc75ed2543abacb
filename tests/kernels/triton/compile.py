"""Compiles kernels for a GPU that is not here, and prints what came of it, a line of JSON a kernel.

    python -m tests.kernels.triton.compile CAPABILITY [--slow] [--only TEXT]

CAPABILITY is 80, 90, ...; a process compiles for one. TRITON_INTERPRET must not be set: it is asked for when kernels
are declared, at import. A launch compiles its kernel for the arguments that it was given, tensors of the CPU, and
computes nothing: what an op returns is whatever was in its memory.

What is compiled stands in the modules cases_*.py beside this one, in each one's CASES.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """Something that launches kernels, given the `TritonOps`; `slow` ones are compiled only when asked for."""

    name: str
    run: Callable[[Any], object]
    slow: bool = False


@dataclass(frozen=True)
class Compiled:
    """A kernel's program.

    Attributes:
        cubin, shared: bytes.
        registers, stack: of a thread, the stack in bytes; None where cubins cannot be read here.
    """

    case: str
    kernel: str
    cubin: int
    shared: int
    warps: int
    registers: int | None
    stack: int | None


def all_cases(slow: bool = False, only: str = "") -> Iterator[Case]:
    """The cases of all modules; only those whose name contains `only`."""
    for path in sorted(Path(__file__).parent.glob("cases_*.py")):
        for case in import_module(f"tests.kernels.triton.{path.stem}").CASES:
            if (slow or not case.slow) and only in case.name:
                yield case


def compile_cases(capability: int, cases: Iterator[Case]) -> Iterator[Compiled]:
    """Compile what the cases launch for a GPU of this capability; a kernel that a case launches twice comes once."""
    return (_compiled(case.name, kernel) for case, kernel in launches(capability, cases))


def launches(capability: int, cases: Iterator[Case]) -> Iterator[tuple[Case, Any]]:
    """`compile_cases`, as Triton gives kernels."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launched: list[Any] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launched.append(launch(self, *args, grid=grid, warmup=True, **options))
        return launched[-1]

    JITFunction.run = compile_only
    driver.set_active(Absent(capability))
    from kvant.kernels.triton.ops import TritonOps

    for case in cases:
        launched.clear()
        try:
            case.run(TritonOps())
        except Exception as error:
            error.add_note(f"in case {case.name!r}")
            raise
        assert launched, f"{case.name} launches no kernel"
        for kernel in {id(kernel): kernel for kernel in launched}.values():
            yield case, kernel


def _compiled(case: str, kernel: Any) -> Compiled:
    facts = kernel.metadata
    registers, stack = resources(kernel.asm["cubin"])
    return Compiled(
        case, kernel.name, len(kernel.asm["cubin"]), facts.shared, facts.num_warps, registers=registers, stack=stack
    )


class Absent:
    """The driver of a GPU of which only the capability is known."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, Any]:
        return {}


@cache
def cubin_reader() -> Path | None:
    """The cuobjdump that comes with Triton."""
    from triton.backends import nvidia

    path = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    return path if path.is_file() else None


def resources(cubin: bytes) -> tuple[int | None, int | None]:
    """A thread's registers and bytes of stack. Registers that did not fit are spilled to the stack."""
    reader = cubin_reader()
    if reader is None:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile kernels without a GPU.")
    parser.add_argument("capability", type=int)
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    for one in compile_cases(asked.capability, all_cases(asked.slow, asked.only)):
        print(json.dumps(asdict(one)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
