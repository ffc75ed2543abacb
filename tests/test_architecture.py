"""The rules of the house, as tests: who imports whom, what an import costs, and how large a file may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvant

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "src" / "kvant").rglob("*.py"))
MAX_LINES = 450


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has imported when `code` has run to its end, or to a `sys.exit(0)`."""
    report = "import atexit, sys; atexit.register(lambda: print('\\n' + ' '.join(sys.modules)))\n"
    done = subprocess.run([sys.executable, "-c", report + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_each_layer_imports_only_from_those_below():
    """By a process of its own: in this one it would silence the loggers that are here already."""
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_kvant_is_light():
    loaded = modules_after("import kvant")
    assert "kvant" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "transformers", "tokenizers", "huggingface_hub", "fastapi", "typer"})


def test_the_pipeline_brings_neither_a_server_nor_foreign_models():
    loaded = modules_after("from kvant import pipeline")
    assert "kvant.pipelines" in loaded
    assert loaded.isdisjoint({"fastapi", "starlette", "uvicorn", "transformers.modeling_utils"})
    assert not [name for name in loaded if name.startswith("transformers.models.")]


def test_help_loads_no_torch():
    loaded = modules_after("sys.argv = ['kvant', '--help']; from kvant.cli.main import main; main()")
    assert "kvant.cli.main" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "transformers", "fastapi"})


@pytest.mark.parametrize("name", kvant.__all__)
def test_every_public_name_exists(name):
    assert getattr(kvant, name) is not None


def test_a_private_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        kvant.no_such_name  # noqa: B018


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_every_module_says_what_it_is_and_stays_small(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert len(text.splitlines()) <= MAX_LINES
