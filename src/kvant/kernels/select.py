"""Which backend computes on which device."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

import torch

from kvant.errors import NativeLibraryError
from kvant.kernels.cpu.library import Library, find_library, load_library, open_library
from kvant.kernels.cpu.native import Native
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.device import check_triton, find_device, runs_triton, use_device
from kvant.kernels.ops import Ops
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.triton import launch


def available_backends(threads: int = 1) -> dict[str, Callable[[], Ops]]:
    """The backends that compute on the CPU's tensors here, by name. One that is not built is absent, not an error.

    Triton is among them where its interpreter is asked for.
    """
    found: dict[str, Callable[[], Ops]] = {ReferenceOps.name: ReferenceOps}
    if launch.interpreted() and launch.runs_here():
        from kvant.kernels.triton.ops import TritonOps

        found[TritonOps.name] = TritonOps
    try:
        library = open_library(find_library())
    except NativeLibraryError:
        return found
    return found | {isa: partial(_native, library, isa, threads) for isa in library.isas}


def select_ops(device: str, threads: int | None = None) -> Ops:
    """The fastest backend for a device, or on a CPU the one that KVANT_CPU_ISA names.

    A GPU becomes the calling thread's current one; other threads that compute there call `use_device`.

    Args:
        device: as `find_device` takes it.
        threads: how many a native backend uses; None takes one per core.

    Raises:
        ConfigError: no backend runs on that device, or what KVANT_CPU_ISA names does not run here.
    """
    found = find_device(device)
    if found.type == "cuda":
        return _gpu_ops(found)
    library = load_library()
    return ReferenceOps() if library is None else _native(library, library.isa, threads or num_cores())


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu_ops(device: torch.device) -> Ops:
    use_device(device)
    if not runs_triton(device):
        return ReferenceOps(device)
    check_triton()
    from kvant.kernels.triton.ops import TritonOps

    return TritonOps(device)


def _native(library: Library, isa: str, threads: int) -> CpuOps:
    return CpuOps(Native.bind(library.functions, isa, threads))
