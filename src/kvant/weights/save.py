"""Writing a checkpoint as an HF directory, shard by shard; it has its name only once it is whole."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kvant.errors import ConfigError, CorruptModelError
from kvant.text.save import save_tokenizer
from kvant.weights.source import TensorSource
from kvant.weights.sources.safetensors import open_safetensors
from kvant.weights.tokenizer import read_tokenizer

_OURS = re.compile(r"model-\d+-of-\d+\.safetensors|\..*\.writing")
_LOCK = ".lock.writing"
INDEX = "model.safetensors.index.json"
# What a tokenizer, a chat template or a family's own code may lie in, for tools that read them.
_KEPT = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".py")
# What speaks of the source's weights alone.
_NOT_KEPT = (
    *("config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    *("quantization_report.json", "adapter_config.json"),
)


class CheckpointWriter:
    """Writes OUT.partial, which becomes OUT at the end.

    Attributes:
        out: the directory that is made.
        partial: the directory that is written until then.
        shards: how many files the tensors are in.
    """

    def __init__(self, out: Path, shards: int) -> None:
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        self.shards = shards

    def shard(self, number: int) -> Path:
        """The file of a shard; the first is 1."""
        return self.partial / f"model-{number:05}-of-{self.shards:05}.safetensors"

    def make(self) -> None:
        """Make the directory, unless it is there.

        Raises:
            ConfigError: it cannot be made.
        """
        with told(self.partial):
            self.partial.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Remove what a run has left before it kept a state; something else may be somebody's work.

        Raises:
            ConfigError: there is something else.
        """
        with told(self.partial):
            left = sorted(self.partial.iterdir())
            if foreign := [path.name for path in left if not _OURS.fullmatch(path.name)]:
                raise ConfigError(
                    f"{self.partial}, where the checkpoint is to be written first, holds {foreign[0]!r}, which no run "
                    "left; remove that directory, or choose another place"
                )
            for path in left:
                if path.name != _LOCK:
                    path.unlink()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from working on the same directory, which must be there.

        Raises:
            ConfigError: another process does.
        """
        path = self.partial / _LOCK
        with told(path), path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"another run is working on {self.partial}; wait for it, or choose another OUT"
                ) from error
            yield

    def check(self, count: int) -> None:
        """That the first shards are there.

        Raises:
            ConfigError: one is not, or is broken.
        """
        for number in range(1, count + 1):
            try:
                open_safetensors(self.shard(number))
            except CorruptModelError as error:
                raise ConfigError(f"{error}; remove {self.partial} to begin again") from error

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard.

        Raises:
            ConfigError: it cannot be written.
        """
        save_whole(self.shard(number), tensors)

    def write_text(self, name: str, content: str) -> None:
        """Write a file of text.

        Raises:
            ConfigError: it cannot be written.
        """
        path = self.partial / name
        with told(path):
            temporary = path.with_name(f".{name}.writing")
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(path)

    def write_json(self, name: str, content: Any) -> None:
        """Write a file of JSON; as `write_text`."""
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def complete(self, config: Mapping[str, Any], source: TensorSource) -> None:
        """Write the index, the config, and the source's tokenizer.

        Raises:
            ConfigError: something cannot be written.
        """
        homes: dict[str, str] = {}
        size = 0
        for number in range(1, self.shards + 1):
            path = self.shard(number)
            homes |= dict.fromkeys(open_safetensors(path).keys(), path.name)
            size += path.stat().st_size
        self.write_json(INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(homes.items()))})
        self.write_json("config.json", config)
        with told(self.partial):
            _write_tokenizer(source, self.partial)

    def publish(self) -> None:
        """Give the directory its name.

        Raises:
            ConfigError: it cannot be renamed.
        """
        with told(self.out):
            (self.partial / _LOCK).unlink()
            self.partial.rename(self.out)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(self.shard(number).stat().st_size for number in range(1, self.shards + 1))


def save_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that is there whole, or not at all; one that is there is replaced.

    Raises:
        ConfigError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.writing")
    with told(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # the library makes files that nobody else may read
            save_file(dict(tensors), temporary, metadata={"format": "pt", **(metadata or {})})
            temporary.chmod(mode)
            # On the disk before it has its name, whatever happens to the machine.
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Errors of the system while a path is written, as ours."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be written: {error}; make room there, or choose another place") from error


def _write_tokenizer(source: TensorSource, directory: Path) -> None:
    """Files that are there stay as they are."""
    if source.metadata:
        save_tokenizer(read_tokenizer(source), directory)
        return
    for path in source.path.iterdir():
        if _kept(path) and not (directory / path.name).exists():
            # A copy that was interrupted must not be taken for a file that is there.
            temporary = shutil.copyfile(path, directory / f".{path.name}.writing")
            temporary.replace(directory / path.name)
    templates = source.path / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, directory / templates.name, dirs_exist_ok=True)


def _kept(path: Path) -> bool:
    name = path.name
    return path.suffix in _KEPT and name not in _NOT_KEPT and not name.endswith(".index.json") and path.is_file()
