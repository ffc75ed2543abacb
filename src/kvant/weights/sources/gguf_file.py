"""GGUF files: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_Value = TypeVar("_Value")

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32  # of tensors, where the file names no other
# Types of values by the numbers that the format has for them.
_SCALARS = MappingProxyType(
    {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
)
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in the mapped file.

    Attributes:
        kind: of its elements or blocks.
        shape: output dimension first, where the file lists the fastest one first.
        data: uint8, `shape` with the bytes of a row for its last dimension.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any]


@dataclass(frozen=True)
class GgufFile:
    """What a file holds: metadata as plain Python, and tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Map a file; its tensors are read when their data is.

    Raises:
        ValueError: it is no GGUF file, of another version or byte order, not whole, or names something twice.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        cursor = _Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if cursor.take(len(_MAGIC)) != _MAGIC:
        raise ValueError("it does not begin as one")
    if (version := cursor.uint32()) not in _VERSIONS:
        raise ValueError(f"its version is {version}, or its byte order big-endian; versions 2 and 3 are known")
    tensors, keys = cursor.uint64(), cursor.uint64()
    metadata = _unique((cursor.string(), cursor.value(cursor.uint32())) for _ in range(keys))
    places = _unique((cursor.string(), cursor.place()) for _ in range(tensors))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment.bit_count() != 1:
        raise ValueError(f"general.alignment is {alignment!r}, which is no power of two")
    start = -(-cursor.position // alignment) * alignment
    data = np.frombuffer(cursor.raw, dtype=np.uint8)[start:]
    return GgufFile(metadata, {name: _tensor(data, place) for name, place in places.items()})


@dataclass(frozen=True)
class _Place:
    """A tensor as the file's head describes it; `offset` counts from where tensors begin."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int


def _tensor(data: np.ndarray[Any, Any], place: _Place) -> GgufTensor:
    elements, size = GGML_QUANT_SIZES[place.kind]
    *outer, columns = place.shape or (1,)
    if columns % elements:
        raise ValueError(f"rows of {columns} elements do not divide into blocks of {place.kind.name}")
    stored = (*outer, columns // elements * size)
    return GgufTensor(place.kind, place.shape, data[place.offset : place.offset + prod(stored)].reshape(stored))


def _unique(pairs: Iterable[tuple[str, _Value]]) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"it names {name!r} twice")
        found[name] = value
    return found


class _Cursor:
    """Reads one thing after the other."""

    def __init__(self, raw: mmap.mmap) -> None:
        self.raw, self.position = raw, 0

    def take(self, size: int) -> bytes:
        begin = self.position
        self._move(begin + size)
        return self.raw[begin : self.position]

    def _move(self, position: int) -> None:
        if position > len(self.raw):
            raise ValueError(f"what begins at byte {self.position} reaches beyond its end")
        self.position = position

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def uint64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self) -> str:
        return str(self.take(self.uint64()), "utf-8")

    def place(self) -> _Place:
        dimensions = self.uint32()
        shape = tuple(self.uint64() for _ in range(dimensions))[::-1]
        return _Place(GGMLQuantizationType(self.uint32()), shape, self.uint64())

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.uint32(), self.uint64())
        return self._scalars(kind, 1)[0]

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            return [self.value(kind) for _ in range(count)]
        return self._scalars(kind, count)

    def _scalars(self, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise ValueError(f"there is no type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        values: list[Any] = np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        return values

    def _strings(self, count: int) -> list[str]:
        """As `string`, for vocabularies of a hundred thousand."""
        texts, raw, size, end = [], self.raw, len(self.raw), self.position
        for _ in range(count):
            begin = end + 8
            end = begin + int.from_bytes(raw[end:begin], "little")
            if end > size:
                break
            texts.append(str(raw[begin:end], "utf-8"))
        self._move(end)
        return texts
