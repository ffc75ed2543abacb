"""The native CPU library: where it lies, whether this kvant can use it, and for which instruction set (ISA).

It is a C library and no Python module: found by importlib, opened with ctypes, never imported. Two variables of the
environment decide. `KVANT_CPU_ISA` picks the ISA; `reference` does without native kernels. `KVANT_CPU_LIBRARY` is the
path of a library to open in place of the installed one.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from kvant.errors import ConfigError, NativeLibraryError
from kvant.kernels.cpu.structs import check_sizes

logger = logging.getLogger("kvant")

REFERENCE = "reference"
_MODULE = "kvant.kernels.cpu._kernels"
_ABI = 7  # kAbi in csrc/api.cpp


@dataclass(frozen=True)
class Library:
    """The native library, opened, and made for this version of kvant.

    Attributes:
        path: its file.
        functions: its C functions, those of csrc/api.cpp.
        isas: the ISAs that it was built for and this CPU has, best first.
        isa: the one to compute with.
    """

    path: Path
    functions: ctypes.CDLL
    isas: tuple[str, ...]
    isa: str


def load_library() -> Library | None:
    """The library that the environment and this machine lead to; None where the reference is to compute.

    A library that is absent or cannot be used is logged, once for a process, with the reason and the remedy.

    Raises:
        ConfigError: the environment asks for an ISA or a library that is not to be had; the message tells what is.
    """
    wanted = os.environ.get("KVANT_CPU_ISA", "")
    if wanted == REFERENCE:
        return None
    try:
        library = open_library(find_library())
    except NativeLibraryError as error:
        for variable in ("KVANT_CPU_LIBRARY", "KVANT_CPU_ISA"):
            if value := os.environ.get(variable):
                raise ConfigError(f"{variable}={value}: {error} Without them: KVANT_CPU_ISA={REFERENCE}.") from error
        _log_absence(str(error))
        return None
    return replace(library, isa=choose_isa(wanted, library.isas))


@cache
def _log_absence(reason: str) -> None:
    logger.warning("PyTorch computes everything, slowly: %s Set KVANT_CPU_ISA=%s if that is meant.", reason, REFERENCE)


def choose_isa(wanted: str, possible: tuple[str, ...]) -> str:
    """`wanted`, or the first of `possible` where it is empty.

    Raises:
        ConfigError: `wanted` is not possible.
    """
    if wanted and wanted not in possible:
        names = ", ".join((*possible, REFERENCE))
        raise ConfigError(f"KVANT_CPU_ISA={wanted}: this CPU and this build of kvant can do {names}")
    return wanted or possible[0]


def find_library() -> Path:
    """The library that KVANT_CPU_LIBRARY names, else the installed one.

    Raises:
        NativeLibraryError: there is none.
    """
    if named := os.environ.get("KVANT_CPU_LIBRARY"):
        return Path(named).absolute()
    try:
        spec = importlib.util.find_spec(_MODULE)
    except ImportError:  # an import hook forbids it
        spec = None
    if spec is None or spec.origin is None:
        raise NativeLibraryError(
            "the native CPU kernels were not built. Install a C++ compiler (g++ or clang++), then kvant once more."
        )
    return Path(spec.origin)


def open_library(path: Path) -> Library:
    """Open a library and check that it is one for this version of kvant; it computes with its best ISA.

    Raises:
        NativeLibraryError: it does not load, or was built from other sources.
    """
    try:
        functions = ctypes.CDLL(os.fspath(path))
        if functions.kvant_abi() != _ABI:
            raise RuntimeError("it was built for another version of kvant")
        check_sizes(functions)
    except (OSError, AttributeError, RuntimeError) as error:
        raise NativeLibraryError(f"the native CPU kernels do not load ({error}). Install kvant once more.") from error
    functions.kvant_isas.restype = ctypes.c_char_p
    isas = tuple(functions.kvant_isas().decode().split(","))
    return Library(path, functions, isas, isas[0])
