"""HF model directories: config.json and safetensors files, sharded or not, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvant.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError
from kvant.formats.weight import PackedWeight
from kvant.models.families import Family, Names
from kvant.weights.codecs.choice import codec_for
from kvant.weights.codecs.codec import StoredModule, StoredTensor, object_of
from kvant.weights.source import TensorSource

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Where quantizers kept their settings before config.json had a place for them.
_OLDER_NOTES = MappingProxyType({"quantize_config.json": "gptq", "quant_config.json": "awq"})
_DENSE = ("F64", "F32", "F16", "BF16")


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
    """A directory with config.json and *.safetensors. Pickled weights are refused: they can run code when read.

    A module that is quantized appears as the matrix that it means, `<module>.weight`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.config = read_json(path / "config.json")
        self.generation = read_json(path / "generation_config.json")
        self.metadata: dict[str, Any] = {}
        if not self.config:
            raise ModelNotFoundError(f"{path} holds no config.json; give a model directory or a .gguf file")
        self._codec = codec_for(quantization_notes(path), path)
        self._files = {file: open_safetensors(file) for file in self._shards()}

    def _shards(self) -> list[Path]:
        if files := safetensors_files(self.path):
            return files
        if any(next(self.path.glob(pattern), None) for pattern in _PICKLES):
            raise UnsupportedModelError(
                f"{self.path} holds pickled weights only, which can run code when read; convert them to safetensors"
            )
        raise ModelNotFoundError(f"{self.path} holds no *.safetensors file")

    @cached_property
    def _stored(self) -> dict[str, StoredTensor]:
        """Our name of every stored tensor -> it. Multimodal files put the text model under a prefix."""
        return {
            text_model_name(stored): _stored_tensor(path, file, stored)
            for path, file in self._files.items()
            for stored in file.keys()  # noqa: SIM118 - a safetensors file is no mapping
        }

    @cached_property
    def _modules(self) -> dict[str, StoredModule]:
        """Quantized modules by the name that their matrix has."""
        if self._codec is None:
            return {}
        found: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in self._stored.items():
            module, _, part = name.rpartition(".")
            if part in self._codec.parts:
                found.setdefault(module, {})[part] = tensor
        return {f"{name}.weight": _module(parts) for name, parts in found.items() if self._codec.owns(parts)}

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        hidden = {tensor.name for module in self._modules.values() for tensor in module.parts.values()}
        shapes = {name: tensor.shape for name, tensor in self._stored.items() if tensor.name not in hidden}
        for name, module in self._modules.items():
            if name in shapes:
                raise CorruptModelError(f"{self._stored[name].file}: {name!r} lies beside a quantized form of itself")
            assert self._codec is not None
            shapes[name] = self._codec.shape(module)
        return shapes

    def files(self) -> list[Path]:
        return [self.path / "config.json", *safetensors_files(self.path)]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        if (weight := self.packed(name)) is not None:
            return weight.dequantize(dtype)
        stored = self._stored[name]
        if stored.dtype not in _DENSE:
            raise UnsupportedModelError(
                f"{stored.file}: tensor {stored.name!r} holds {stored.dtype}, not weights of 16 or 32 bits"
            )
        return stored.read().to(dtype)

    def packed(self, name: str) -> PackedWeight | None:
        module = self._modules.get(name)
        return None if module is None or self._codec is None else self._codec.decode(module)

    def packed_bits(self, name: str) -> float | None:
        module = self._modules.get(name)
        return None if module is None or self._codec is None else self._codec.bits(module)

    def names_of(self, family: Family) -> Names:
        return family.names


def _stored_tensor(path: Path, file: Any, stored: str) -> StoredTensor:
    view = file.get_slice(stored)
    return StoredTensor(path, stored, tuple(view.get_shape()), view.get_dtype(), partial(file.get_tensor, stored))


def _module(parts: Mapping[str, StoredTensor]) -> StoredModule:
    name = next(iter(parts.values())).name
    return StoredModule(name.rpartition(".")[0], parts)


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
    """What a checkpoint's files say of its quantization: config.json's quantization_config, hf_quant_config.json; where
    both are silent, the files that quantizers wrote before.

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
    found = [{**note, **object_of(note, "quantization")} for note in notes.values() if note]
    older = [{"quant_method": method, **read_json(directory / name)} for name, method in _OLDER_NOTES.items()]
    return found or [note for note in older if len(note) > 1][:1]
