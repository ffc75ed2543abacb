"""Kernels compile for the GPUs that they are for, and fit them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.triton.cases_attention import BATCHES
from tests.kernels.triton.compile import Compiled, all_cases

ROOT = Path(__file__).parents[3]
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program may have


@cache
def compiled(capability: int, slow: bool) -> tuple[Compiled, ...]:
    """All kernels of the cases; a process of its own compiles them, since kernels here are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton.compile", str(capability), *["--slow"] * slow]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return tuple(Compiled(**json.loads(line)) for line in ended.stdout.splitlines())


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("capability", SHARED)
def test_all_kernels_compile_and_fit(capability, slow):
    kernels = compiled(capability, slow)
    assert {kernel.case for kernel in kernels} == {case.name for case in all_cases(slow)}
    for kernel in kernels:
        assert kernel.cubin > 1000, kernel
        assert kernel.shared <= SHARED[capability], kernel
        print(kernel)


def test_a_kernel_is_not_compiled_again_for_another_batch():
    kernels = [kernel.kernel for kernel in compiled(90, False) if kernel.case == BATCHES.name]
    assert kernels.count("_attend_rows") == kernels.count("shape_queries") == 1


@pytest.mark.parametrize("capability", SHARED)
def test_no_kernel_spills_much(capability):
    """A hundred bytes of a thread's stack are values that wait beside a loop; more are registers that it lacks."""
    kernels = [kernel for kernel in compiled(capability, False) if kernel.stack is not None]
    if not kernels:
        pytest.skip("cuobjdump is not here")
    assert not [kernel for kernel in kernels if kernel.stack > 128]
