"""`kvant env`: what a bug report should say about the machine and the installation."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from kvant import __version__
from kvant.errors import NativeLibraryError

app = typer.Typer(rich_markup_mode=None, add_completion=False)

_CPUINFO = Path("/proc/cpuinfo")
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "gguf", "numpy")
# The instructions that kernels for quantized models are written in, on x86 and on Arm, as Linux names them.
_FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Tell what a bug report needs: versions, CPU, memory, native kernels, GPUs.

    \b
    kvant env
    kvant env --json
    """  # noqa: D301
    report = collect()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for name, value in report.items():
        shown = " ".join(value) if isinstance(value, list) else value
        typer.echo(f"{name.replace('_', ' '):16}{shown}")


def collect() -> dict[str, Any]:
    """The report."""
    return {
        "kvant": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        **_cpu(),
        **_memory(),
        "threads": _threads(),
        **_native_kernels(),
        "gpu": _gpus(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> dict[str, Any]:
    text = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    name = re.search(r"^(?:model name|Processor)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return {
        "cpu": name[1] if name else platform.processor() or "unknown",
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_features": [feature for feature in _FEATURES if feature in present],
    }


def _memory() -> dict[str, str]:
    from kvant.cache.memory import available_memory

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"memory_total": f"{total / 2**30:.1f} GiB", "memory_free": f"{available_memory() / 2**30:.1f} GiB"}


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _native_kernels() -> dict[str, Any]:
    from kvant.kernels.cpu.library import REFERENCE, find_library, load_library, open_library

    loaded = load_library()
    try:
        library = loaded or open_library(find_library())
    except NativeLibraryError as error:
        return {"native_kernels": f"none: {error}", "cpu_isa": REFERENCE, "cpu_isas": [REFERENCE]}
    isa = loaded.isa if loaded else REFERENCE
    return {"native_kernels": str(library.path), "cpu_isa": isa, "cpu_isas": [*library.isas, REFERENCE]}


def _gpus() -> str:
    """What each is, or why there is none."""
    import torch

    from kvant.kernels.device import gpu_problem

    problem = gpu_problem()
    if problem is not None:
        return f"none: {problem}"
    return "; ".join(_gpu(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count()))


def _gpu(properties: Any) -> str:
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name} (compute capability {capability}, {properties.total_memory / 2**30:.0f} GiB)"
