"""What an installed kvant consists of: the wheel that pip builds from this tree."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvant

ROOT = Path(__file__).parent.parent


NATIVE = "kvant/kernels/cpu/_kernels.so"
CAN_BUILD = bool(shutil.which("cmake") and shutil.which(os.environ.get("CXX", "c++")))


def build(target: Path, **environment: str) -> zipfile.ZipFile:
    """The wheel that pip builds with these variables; its library unoptimized, which takes seconds and not minutes."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={target}"]
    options.append("--config-settings=cmake.build-type=Debug")
    command = [sys.executable, "-m", "pip", "wheel", *options, str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def python_files() -> set[str]:
    """What a wheel holds wherever it is built."""
    source = ROOT / "src" / "kvant"
    files = (path for path in source.rglob("*") if path.is_file() and path.suffix in (".py", ".typed", ".txt", ".json"))
    return {f"kvant/{path.relative_to(source)}" for path in files}


def content(wheel: zipfile.ZipFile) -> set[str]:
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return build(tmp_path_factory.mktemp("wheel"), KVANT_NO_NATIVE=str(int(not CAN_BUILD)))


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (member,) = (entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}"))
    return wheel.read(member).decode()


def test_the_wheel_holds_the_package_and_the_library_and_nothing_else(wheel):
    assert "kvant/py.typed" in python_files()
    assert content(wheel) == python_files() | ({NATIVE} if CAN_BUILD else set())


@pytest.mark.parametrize("environment", [{"KVANT_NO_NATIVE": "1"}, {"CXX": shutil.which("false")}], ids=str)
def test_where_nothing_is_built_the_wheel_is_pure(tmp_path, environment):
    if not CAN_BUILD and "CXX" in environment:
        pytest.skip("a build that fails needs CMake and a C++ compiler")
    pure = build(tmp_path, **environment)
    assert content(pure) == python_files()
    assert Parser().parsestr(metadata(pure, "WHEEL"))["Tag"] == "py3-none-any"


@pytest.mark.skipif(not CAN_BUILD, reason="CMake or a C++ compiler is not here")
def test_the_library_serves_any_python_on_the_platform(wheel, tmp_path):
    interpreter, abi, platform = Parser().parsestr(metadata(wheel, "WHEEL"))["Tag"].split("-", 2)
    assert (interpreter, abi) == ("py3", "none")
    assert platform != "any"
    wheel.extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from kvant.kernels.cpu.library import load_library
print(load_library().path)
print(load_library().isas)
"""
    bare = [sys.executable, "-I", "-S", "-c", code]  # no site-packages: neither torch nor an editable kvant
    done = subprocess.run(bare, check=True, capture_output=True, text=True, env={})
    path, isas = done.stdout.splitlines()
    assert Path(path) == tmp_path / NATIVE
    assert "generic" in isas


def test_the_wheel_carries_version_license_and_command(wheel):
    fields = Parser().parsestr(metadata(wheel, "METADATA"))
    assert fields["Version"] == kvant.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert "kvant = kvant.cli.main:main" in metadata(wheel, "entry_points.txt")
    assert "TERMS AND CONDITIONS" in metadata(wheel, "licenses/LICENSE")


def test_the_core_needs_no_server_and_no_accelerator(wheel):
    fields = Parser().parsestr(metadata(wheel, "METADATA"))
    requirements = [Requirement(text) for text in fields.get_all("Requires-Dist")]
    core = {requirement.name for requirement in requirements if requirement.marker is None}
    assert "torch" in core
    assert core.isdisjoint({"fastapi", "uvicorn", "ray", "triton", "accelerate"})


def test_every_dependency_has_a_range_and_a_tested_version_in_it(wheel):
    pins = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    tested = {canonical(name): version for name, version in (pin.split("==") for pin in pins)}
    fields = Parser().parsestr(metadata(wheel, "METADATA"))
    for requirement in map(Requirement, fields.get_all("Requires-Dist")):
        if requirement.name != "kvant":
            assert requirement.specifier
            assert requirement.specifier.contains(tested[canonical(requirement.name)]), requirement


def test_every_package_that_is_imported_is_declared(wheel):
    fields = Parser().parsestr(metadata(wheel, "METADATA"))
    declared = {canonical(Requirement(text).name) for text in fields.get_all("Requires-Dist")}
    providers = importlib.metadata.packages_distributions()
    imported = {name for path in (ROOT / "src").rglob("*.py") for name in imports(path)}
    foreign = imported - sys.stdlib_module_names - {"kvant"}
    assert "torch" in foreign
    assert [name for name in foreign if declared.isdisjoint(map(canonical, providers.get(name, [])))] == []


def imports(path: Path) -> set[str]:
    """The top-level names of all that a file imports, wherever in the file."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in names}


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")
