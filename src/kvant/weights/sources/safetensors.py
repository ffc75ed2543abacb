"""HF model directories: config.json and safetensors files, sharded or not, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvant.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from kvant.models.families import Family, Names
from kvant.weights.source import TensorSource

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; absent is empty.

    Raises:
        CorruptModelError: the file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CorruptModelError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptModelError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


class SafetensorsSource(TensorSource):
    """A directory with config.json and *.safetensors. Pickled weights are refused: they can run code when read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.config = read_json(path / "config.json")
        self.generation = read_json(path / "generation_config.json")
        self.metadata: dict[str, Any] = {}
        if not self.config:
            raise ModelNotFoundError(f"{path} holds no config.json; give a model directory or a .gguf file")
        if self.config.get("quantization_config"):
            method = self.config["quantization_config"].get("quant_method", "unknown")
            raise UnsupportedModelError(
                f"{path}: quantized checkpoints ({method}) cannot be loaded yet; use 16-bit weights"
            )
        self._files = [self._open(file) for file in self._shards()]

    def _shards(self) -> list[Path]:
        index = read_json(self.path / "model.safetensors.index.json")
        names = sorted(set(index.get("weight_map", {}).values())) if index else []
        for name in names:
            if Path(name).name != name:
                raise CorruptModelError(f"{self.path}: the index names {name!r}, outside of the model's directory")
        files = [self.path / name for name in names] or sorted(self.path.glob("*.safetensors"))
        if files:
            return files
        if any(next(self.path.glob(pattern), None) for pattern in _PICKLES):
            raise UnsupportedModelError(
                f"{self.path} holds pickled weights only, which can run code when read; convert them to safetensors"
            )
        raise ModelNotFoundError(f"{self.path} holds no *.safetensors file")

    def _open(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except FileNotFoundError as error:
            raise CorruptModelError(
                f"{file}, a part of the model, is missing; the download may be incomplete"
            ) from error
        except (SafetensorError, OSError) as error:
            raise CorruptModelError(f"{file} is not a whole safetensors file: {error}") from error

    @cached_property
    def _homes(self) -> dict[str, tuple[Any, str]]:
        """Our tensor name -> the open file and the name in it. Multimodal files put the text model under a prefix."""
        homes = {}
        for file in self._files:
            for stored in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                homes[_text_model_name(stored)] = (file, stored)
        return homes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(stored).get_shape()) for name, (file, stored) in self._homes.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        file, stored = self._homes[name]
        tensor: Tensor = file.get_tensor(stored)
        if not tensor.is_floating_point():
            raise UnsupportedModelError(
                f"{self.path}: tensor {stored!r} holds {tensor.dtype}, not floating-point weights"
            )
        return tensor.to(dtype)

    def names_of(self, family: Family) -> Names:
        return family.names


def _text_model_name(stored: str) -> str:
    """`language_model.model.x` and `model.language_model.x` are the text model's `model.x`."""
    for prefix in ("model.language_model.", "language_model.model."):
        if stored.startswith(prefix):
            return "model." + stored.removeprefix(prefix)
    return stored.removeprefix("language_model.")
