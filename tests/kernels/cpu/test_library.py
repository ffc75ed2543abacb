"""Finding and opening the native CPU library, and choosing its instruction set."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from kvant.errors import ConfigError, NativeLibraryError
from kvant.kernels.cpu import library, structs
from kvant.kernels.cpu.library import choose_isa, find_library, load_library, open_library

POSSIBLE = ("avx512", "avx2", "generic")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asked for in the environment, nothing logged before."""
    for variable in ("KVANT_CPU_ISA", "KVANT_CPU_LIBRARY"):
        monkeypatch.delenv(variable, raising=False)
    library._log_absence.cache_clear()


@pytest.fixture(scope="module")
def built() -> Path:
    """The library of this run, found before a test changes the environment."""
    try:
        return find_library()
    except NativeLibraryError as error:
        pytest.skip(str(error))


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a checkout that was never built."""
    monkeypatch.setattr(library, "_MODULE", "kvant.kernels.cpu._never_built")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "_kernels.so"
    path.write_text("no library")
    return path


@pytest.mark.parametrize(("wanted", "chosen"), [("", "avx512"), *((isa, isa) for isa in POSSIBLE)])
def test_the_best_isa_is_taken_unless_another_is_asked_for(wanted, chosen):
    assert choose_isa(wanted, POSSIBLE) == chosen


@pytest.mark.parametrize("wanted", ["neon", "AVX2", "avx2,generic", " "])
def test_an_isa_that_is_not_possible_is_refused_and_those_that_are_named(wanted):
    with pytest.raises(ConfigError, match="KVANT_CPU_ISA=.*can do avx512, avx2, generic, reference"):
        choose_isa(wanted, POSSIBLE)


def test_the_library_loads_with_its_best_isa(built, monkeypatch):
    monkeypatch.setenv("KVANT_CPU_LIBRARY", str(built))
    found = load_library()
    assert found.path == built
    assert found.isa == found.isas[0]
    assert found.isas[-1] == "generic"
    for isa in found.isas:
        monkeypatch.setenv("KVANT_CPU_ISA", isa)
        assert load_library().isa == isa
    monkeypatch.setenv("KVANT_CPU_ISA", "avx9")
    with pytest.raises(ConfigError, match=f"avx9.*{', '.join(found.isas)}, reference"):
        load_library()


def test_a_library_of_another_version_is_refused(built, monkeypatch):
    monkeypatch.setattr(library, "_ABI", 0)
    with pytest.raises(NativeLibraryError, match="another version of kvant"):
        open_library(built)


def test_a_library_with_other_structures_is_refused(built, monkeypatch):
    class Weight(ctypes.Structure):
        _fields_ = (("kind", ctypes.c_int8),)

    monkeypatch.setattr(structs, "_ALL", (Weight, *structs._ALL[1:]))
    with pytest.raises(NativeLibraryError, match="other sources"):
        open_library(built)


def test_a_file_that_is_no_library_of_kvant_is_refused(text_file):
    torch = Path(importlib.util.find_spec("torch").origin).parent
    for path in (text_file, text_file.with_name("absent.so"), *torch.glob("lib/libc10.*")):
        with pytest.raises(NativeLibraryError, match="do not load"):
            open_library(path)


def test_without_a_library_the_reference_computes_and_one_line_says_why(nothing_built, caplog):
    with caplog.at_level(logging.INFO):
        assert [load_library(), load_library()] == [None, None]
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("kvant", "WARNING")
    assert "not built. Install a C++ compiler" in record.message
    assert "KVANT_CPU_ISA=reference" in record.message


def test_a_library_that_does_not_load_is_told_once_too(text_file, monkeypatch, caplog):
    monkeypatch.setattr(library, "find_library", lambda: text_file)
    assert [load_library(), load_library()] == [None, None]
    (record,) = caplog.records
    assert str(text_file) in record.message


def test_the_reference_on_demand_is_silent(nothing_built, monkeypatch, caplog):
    monkeypatch.setenv("KVANT_CPU_ISA", "reference")
    assert load_library() is None
    assert caplog.records == []


@pytest.mark.parametrize(("variable", "value"), [("KVANT_CPU_ISA", "generic"), ("KVANT_CPU_LIBRARY", "absent.so")])
def test_what_is_asked_for_and_not_to_be_had_is_an_error(nothing_built, monkeypatch, caplog, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{variable}={value}.*KVANT_CPU_ISA=reference"):
        load_library()
    assert caplog.records == []


def test_a_forbidden_import_is_an_absent_library(monkeypatch):
    class Forbid:
        def find_spec(self, name, path=None, target=None):
            if name == library._MODULE:
                raise ImportError(name)

    monkeypatch.setattr(sys, "meta_path", [Forbid(), *sys.meta_path])
    with pytest.raises(NativeLibraryError, match="not built"):
        find_library()


def test_loading_it_needs_neither_torch_nor_numpy():
    code = "import sys, kvant.kernels.cpu.library; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
