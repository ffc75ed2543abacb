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
# With these methods, a checkpoint may have a quantized KV cache and nothing else.
_KEEP_PLAIN_WEIGHTS = ("compressed-tensors", "modelopt")


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
        if (method := weight_quantization(path)) is not None:
            raise UnsupportedModelError(
                f"{path}: quantized checkpoints ({method}) cannot be loaded yet; use 16-bit weights"
            )
        self._files = [open_safetensors(file) for file in self._shards()]

    def _shards(self) -> list[Path]:
        if files := safetensors_files(self.path):
            return files
        if any(next(self.path.glob(pattern), None) for pattern in _PICKLES):
            raise UnsupportedModelError(
                f"{self.path} holds pickled weights only, which can run code when read; convert them to safetensors"
            )
        raise ModelNotFoundError(f"{self.path} holds no *.safetensors file")

    @cached_property
    def _homes(self) -> dict[str, tuple[Any, str]]:
        """Our tensor name -> the open file and the name in it. Multimodal files put the text model under a prefix."""
        homes = {}
        for file in self._files:
            for stored in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                homes[text_model_name(stored)] = (file, stored)
        return homes

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(stored).get_shape()) for name, (file, stored) in self._homes.items()}

    def files(self) -> list[Path]:
        return [self.path / "config.json", *safetensors_files(self.path)]

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


def safetensors_files(directory: Path) -> list[Path]:
    """The files that the directory's index names; without an index, all safetensors files of the directory.

    Raises:
        CorruptModelError: the index cannot be read, or names a file outside of the directory.
    """
    index = read_json(directory / "model.safetensors.index.json")
    names = sorted(set(index.get("weight_map", {}).values())) if index else []
    for name in names:
        if Path(name).name != name:
            raise CorruptModelError(f"{directory}: the index names {name!r}, outside of the model's directory")
    return [directory / name for name in names] or sorted(directory.glob("*.safetensors"))


def open_safetensors(file: Path) -> Any:
    """An open safetensors file; tensors are read when they are asked for.

    Raises:
        CorruptModelError: it is missing or not whole.
    """
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise CorruptModelError(f"{file}, a part of the model, is missing; the download may be incomplete") from error
    except (SafetensorError, OSError) as error:
        raise CorruptModelError(f"{file} is not a whole safetensors file: {error}") from error


def text_model_name(stored: str) -> str:
    """`language_model.model.x` and `model.language_model.x` are the text model's `model.x`."""
    for prefix in ("model.language_model.", "language_model.model."):
        if stored.startswith(prefix):
            return "model." + stored.removeprefix(prefix)
    return stored.removeprefix("language_model.")


def quantization_notes(directory: Path) -> list[dict[str, Any]]:
    """What a checkpoint's files say of its quantization: config.json's quantization_config, hf_quant_config.json.

    A nested "quantization", as ModelOpt writes it, is laid over the rest of its note.

    Raises:
        CorruptModelError: one of them is no JSON object.
    """
    notes = {
        "config.json": read_json(directory / "config.json").get("quantization_config"),
        "hf_quant_config.json": read_json(directory / "hf_quant_config.json"),
    }
    for name, note in notes.items():
        if note is not None and not isinstance(note, dict):
            raise CorruptModelError(f"{directory / name}: quantization_config must be an object, not {note!r:.40}")
    return [{**note, **_object(note, "quantization")} for note in notes.values() if note]


def weight_quantization(directory: Path) -> str | None:
    """How the checkpoint's weights are quantized; None for plain ones, beside which scales for a KV cache may lie.

    Raises:
        CorruptModelError: what the files say of it cannot be read.
    """
    for note in quantization_notes(directory):
        method = note.get("quant_method") or _object(note, "producer").get("name") or "unknown"
        groups = _object(note, "config_groups")
        quantized = note.get("quant_algo") or any(_object(groups, name).get("weights") for name in groups)
        sparse = _object(note, "sparsity_config").get("format", "dense") != "dense"
        if method not in _KEEP_PLAIN_WEIGHTS or quantized or sparse:
            return str(method)
    return None


def _object(holder: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under a key, empty where it is absent or null."""
    value = holder.get(key) or {}
    if not isinstance(value, dict):
        raise CorruptModelError(f"the checkpoint's quantization: {key!r} must be an object, not {value!r:.40}")
    return value
