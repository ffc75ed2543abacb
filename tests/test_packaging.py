"""What an installed kvant consists of: the wheel that pip builds from this tree."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import kvant

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    target = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", f"--wheel-dir={target}"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True, capture_output=True)
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (member,) = (entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}"))
    return wheel.read(member).decode()


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    source = ROOT / "src" / "kvant"
    expected = {
        f"kvant/{p.relative_to(source)}"
        for p in source.rglob("*")
        if p.is_file() and p.suffix in (".py", ".typed", ".txt")
    }
    assert "kvant/py.typed" in expected
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected


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
