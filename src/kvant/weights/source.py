"""What loading needs of a checkpoint, whatever files it lies in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvant.errors import CorruptModelError
from kvant.formats.weight import PackedWeight
from kvant.models.families import Family, Names


class TensorSource(ABC):
    """A checkpoint: a config and tensors by name, read when asked for.

    Attributes:
        path: the directory or file.
        config: in the terms of an HF config.json.
        generation: generation_config.json's values, where there are any.
        metadata: a GGUF's own metadata; empty for other files.
    """

    path: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    metadata: Mapping[str, Any]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._used: set[str] = set()

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape in torch's order, output dimension first."""

    @abstractmethod
    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor's values in `dtype`. It may alias the mapped file: treat it as read-only."""

    def packed(self, name: str) -> PackedWeight | None:
        """A matrix in the bits that the file has it in, a GGUF's scales rounded to float16; None where it cannot be had
        so.
        """
        return None

    def packed_bits(self, name: str) -> float | None:
        """Bits that an element of such a matrix takes, scales and zeros included; None where `packed` has nothing."""
        return None

    @abstractmethod
    def names_of(self, family: Family) -> Names:
        """What this kind of file calls the family's tensors."""

    def files(self) -> list[Path]:
        """The files that the weights lie in."""
        return [self.path]

    def num_parameters(self) -> int:
        """Elements in all tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes().values())

    def unread(self) -> set[str]:
        """Names of the tensors that nobody asked `checked` or `checked_packed` for."""
        return set(self.shapes()) - self._used

    def checked(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """`read`, for a tensor that must be there in this shape.

        Raises:
            CorruptModelError: it is missing or has another shape.
        """
        self._check(name, shape)
        return self.read(name, dtype)

    def checked_packed(self, name: str, shape: tuple[int, ...]) -> PackedWeight | None:
        """`packed`, for a tensor that must be there in this shape.

        Raises:
            CorruptModelError: it is missing or has another shape.
        """
        self._check(name, shape)
        return self.packed(name)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        self._used.add(name)
        found = self.shapes().get(name)
        if found is None:
            raise CorruptModelError(f"{self.path}: the tensor {name!r} is missing; the download may be incomplete")
        if found != shape:
            raise CorruptModelError(f"{self.path}: tensor {name!r} has shape {found}, the config implies {shape}")
