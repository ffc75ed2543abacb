"""Converted models: a checkpoint's weights as one backend computes on them, to be mapped instead of loaded.

A workspace is a directory: `workspace.json`, the header; a shard for each rank, of raw tensors at multiples of
`ALIGNMENT`; the tokenizer's files; generation_config.json. The header tells whose layout the tensors have, and for each
its type, shape and place.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from kvant.errors import CorruptModelError, UnsupportedModelError
from kvant.kernels.cpu.weights import LAYOUT as CPU_LAYOUT
from kvant.models.families import Family, Names
from kvant.version import __version__
from kvant.weights.locate import WORKSPACE_HEADER
from kvant.weights.source import TensorSource
from kvant.weights.sources.safetensors import read_json
from kvant.weights.stored import Piece, Stored, from_stored, shape_of, to_stored

FORMAT = 1
LAYOUTS: Final[Mapping[str, int]] = MappingProxyType({"cpu": CPU_LAYOUT, "cuda": 1})
"""The versions of the layouts that a shard's tensors may have: the native kernels' memory, `PackedWeight`'s planes."""
ALIGNMENT = 64  # a cache line, and what any vector instruction may ask for

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
}


@dataclass(frozen=True)
class Made:
    """What a workspace was made for, and with.

    Attributes:
        backend: whose layout its tensors have.
        layout: that layout's version.
        tp: into how many ranks the model is cut.
        dtype: the compute type.
        weights: "auto", "dense", or the name of the rounding.
        parameters: of the checkpoint.
    """

    backend: str
    layout: int
    tp: int
    dtype: str
    weights: str
    parameters: int

    def __post_init__(self) -> None:
        numbers = (self.layout, self.tp, self.parameters)
        if self.backend not in LAYOUTS or self.dtype not in _DTYPES or not all(type(n) is int for n in numbers):
            raise ValueError(f"{self} makes no sense")


@dataclass(frozen=True)
class ShardEntry:
    """What the header tells of a shard.

    Attributes:
        file: its name.
        nbytes: its length.
        pieces: by name, "facts" as `Stored` has them and "tensors": dtype, shape, offset and nbytes of each.
    """

    file: str
    nbytes: int
    pieces: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> ShardEntry:
        """From the header.

        Raises:
            KeyError, TypeError, ValueError: it is malformed.
        """
        pieces = {
            str(name): {part: dict(piece[part]) for part in ("facts", "tensors")}
            for name, piece in dict(entry["pieces"]).items()
        }
        return cls(Path(entry["file"]).name, int(entry["nbytes"]), pieces)


class ShardWriter:
    """Writes one rank's pieces, one after the other.

    Raises:
        OSError: from any method, where the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._pieces: dict[str, Any] = {}

    def add(self, name: str, piece: Piece) -> None:
        """Append a matrix or vector."""
        stored = to_stored(piece)
        tensors = {part: self._append(tensor) for part, tensor in stored.tensors.items()}
        self._pieces[name] = {"facts": dict(stored.facts), "tensors": tensors}

    def _append(self, tensor: Tensor) -> dict[str, Any]:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(tensor.shape), "offset": offset, "nbytes": tensor.nbytes}

    def finish(self) -> ShardEntry:
        """What the header tells of the shard, once it is on the disk: what is renamed afterwards must be whole."""
        entry = ShardEntry(Path(self._file.name).name, self._file.tell(), self._pieces)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return entry

    def abandon(self) -> None:
        """Close the file, however much of it is written."""
        self._file.close()


def write_header(directory: Path, made: Made, config: Mapping[str, Any], shards: Sequence[ShardEntry]) -> None:
    """The last file of a workspace.

    Args:
        directory: the workspace.
        made: what it was made for.
        config: the model's, in the terms of an HF config.json.
        shards: what each rank's `ShardWriter.finish` gave.

    Raises:
        OSError: it cannot be written.
    """
    header = {"format": FORMAT, "kvant": __version__, **asdict(made), "config": dict(config)}
    header["shards"] = [asdict(shard) for shard in shards]
    with (directory / WORKSPACE_HEADER).open("w", encoding="utf-8") as file:
        json.dump(header, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


class WorkspaceSource(TensorSource):
    """A converted model. It has no weights to read, only pieces that are ready.

    Attributes:
        made: what it was made for.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        header = read_json(path / WORKSPACE_HEADER)
        if (found := header.get("format")) != FORMAT:
            raise UnsupportedModelError(
                f"{path} was written by kvant {header.get('kvant', '(unknown)')} in format {found}, and this one reads "
                f"format {FORMAT}; convert the model again"
            )
        try:
            self.made = Made(**{name: header[name] for name in Made.__dataclass_fields__})
            self.config = dict(header["config"])
            self._shards = [ShardEntry.read(entry) for entry in header["shards"]]
            if len(self._shards) != self.made.tp:
                raise ValueError(f"{len(self._shards)} shards for {self.made.tp} ranks")
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptModelError(
                f"{path / WORKSPACE_HEADER} is not whole: {error!r}; convert the model again"
            ) from error
        self.generation = read_json(path / "generation_config.json")
        self.metadata: dict[str, Any] = {}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        raise self._refusal()

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        raise self._refusal()

    def _refusal(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.path} is a converted model, whose weights cannot be read any more; use the model it was made from"
        )

    def names_of(self, family: Family) -> Names:
        return family.names

    def files(self) -> list[Path]:
        return [self.path / WORKSPACE_HEADER, *(self.path / shard.file for shard in self._shards)]

    def num_parameters(self) -> int:
        return self.made.parameters

    def is_quantized(self) -> bool:
        """Whether any of its matrices is in 4 or 8 bits."""
        facts = [entry["facts"] for shard in self._shards for entry in shard.pieces.values()]
        return any(str(of.get("kind", of.get("format"))).startswith("int") for of in facts)

    def open_shard(self, rank: int = 0) -> Shard:
        """One rank's weights, mapped.

        Raises:
            CorruptModelError: the file is missing, or not as long as the header says.
        """
        return Shard(self.path, self._shards[rank])


class Shard:
    """One rank's tensors in the mapped file, which is read when they are. Treat them as read-only."""

    def __init__(self, directory: Path, entry: ShardEntry) -> None:
        self.path, self.nbytes = directory / entry.file, entry.nbytes
        self._pieces = entry.pieces
        self._data = _mapped(self.path, self.nbytes)

    def __contains__(self, name: object) -> bool:
        return name in self._pieces

    def piece(self, name: str, shape: tuple[int, ...]) -> Any:
        """The matrix or vector of this name, which has this shape.

        Raises:
            CorruptModelError: it is missing, has another shape, or is not described as it should be.
        """
        entry = self._pieces.get(name)
        if entry is None:
            raise CorruptModelError(f"{self.path} has no {name!r}; convert the model again")
        try:
            tensors = {part: self._tensor(**place) for part, place in entry["tensors"].items()}
            piece = from_stored(Stored(tensors, entry["facts"]))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, CorruptModelError) as error:
            raise CorruptModelError(f"{self.path}: {name!r} is damaged: {error}; convert the model again") from error
        if (found := shape_of(piece)) != shape:
            raise CorruptModelError(f"{self.path}: {name!r} has shape {found}, the config implies {shape}")
        return piece

    def _tensor(self, dtype: str, shape: list[int], offset: int, nbytes: int) -> Tensor:
        kind = _DTYPES[dtype]
        if offset < 0 or offset % ALIGNMENT or not 0 <= nbytes <= self.nbytes - offset:
            raise ValueError(f"{nbytes} bytes at {offset} are outside of the file, or not aligned")
        return self._data[offset : offset + nbytes].view(kind).view(shape)


def _mapped(path: Path, nbytes: int) -> Tensor:
    """A file of so many bytes, mapped."""
    try:
        with path.open("rb") as file:
            if (found := os.fstat(file.fileno()).st_size) != nbytes:
                raise CorruptModelError(
                    f"{path} has {found:,} bytes where {nbytes:,} belong; it was not copied whole, or is damaged"
                )
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CorruptModelError(f"{path} cannot be mapped: {error}") from error
    if hasattr(mmap, "MADV_WILLNEED"):
        memory.madvise(mmap.MADV_WILLNEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is read-only
        return torch.frombuffer(memory, dtype=torch.uint8)
