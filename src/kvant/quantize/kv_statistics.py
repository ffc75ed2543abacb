"""What a model's queries, keys and values look like: measured once on a text, kept in a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvant.errors import CorruptModelError
from kvant.formats.kv import KVShape
from kvant.quantize.scales.writing import write_whole

STATISTICS_FILE = "kv_statistics.safetensors"
VERSION = "1"
_REMEDY = "measure this model with `kvant calibrate MODEL --kv -o DIR`"


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """One layer's, all float32. The first tokens of a text, the sinks, are left out of the moments: they are outliers.

    Attributes:
        key_mean, key_variance: [kv_heads, head_dim], of the keys before RoPE.
        query_moment: E[q q^T] of the queries before RoPE, over the query heads that share a KV head:
            [kv_heads, head_dim, head_dim].
        key_range, value_range: [kv_heads], the largest magnitude of keys after RoPE, and of values.
        shaped_key_range: [kv_heads], of keys after RoPE that are centred, balanced and rotated.
    """

    key_mean: Tensor
    key_variance: Tensor
    query_moment: Tensor
    key_range: Tensor
    value_range: Tensor
    shaped_key_range: Tensor


# How many of the last dimensions are head_dim long; before them come layers and KV heads.
_VECTOR_DIMS: Mapping[str, int] = MappingProxyType({"key_mean": 1, "key_variance": 1, "query_moment": 2})


@dataclass(frozen=True, eq=False)
class KVStatistics:
    """Every layer's; `tokens` were read to measure them."""

    layers: tuple[LayerStatistics, ...]
    tokens: int

    def save(self, path: Path) -> None:
        """Write a safetensors file, at once.

        Raises:
            ConfigError: it cannot be written.
        """
        names = [field.name for field in fields(LayerStatistics)]
        stacked = {name: torch.stack([getattr(layer, name) for layer in self.layers]) for name in names}
        write_whole(path, save(stacked, {"kvant_kv_statistics": VERSION, "tokens": str(self.tokens)}))

    @classmethod
    def load(cls, path: Path, shape: KVShape) -> KVStatistics:
        """Read what `save` wrote.

        Raises:
            CorruptModelError: the file is none of these, is damaged, or belongs to a model of another shape.
        """
        stored, tokens = _read(path)
        stacked = {field.name: _checked(path, stored, field.name, shape) for field in fields(LayerStatistics)}
        by_layer = ({name: of_all[layer] for name, of_all in stacked.items()} for layer in range(shape.num_layers))
        return cls(tuple(LayerStatistics(**values) for values in by_layer), tokens)


def _checked(path: Path, stored: Mapping[str, Tensor], name: str, shape: KVShape) -> Tensor:
    """A file's tensor of this name, all layers'."""
    expected = (shape.num_layers, shape.num_kv_heads, *(shape.head_dim,) * _VECTOR_DIMS.get(name, 0))
    found = stored.get(name)
    if found is None or found.dtype != torch.float32 or tuple(found.shape) != expected:
        raise CorruptModelError(
            f"{path} has no {name} of shape {expected} in float32; it is damaged or another model's, so {_REMEDY}"
        )
    if not found.isfinite().all():
        raise CorruptModelError(f"{path}: {name} is not finite; {_REMEDY}")
    return found


def _read(path: Path) -> tuple[dict[str, Tensor], int]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stacked = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        raise CorruptModelError(f"KV statistics cannot be read from {path}: {error}; {_REMEDY}") from error
    if metadata.get("kvant_kv_statistics") != VERSION or not metadata.get("tokens", "").isdecimal():
        raise CorruptModelError(f"{path} holds no KV statistics that this version of kvant reads; {_REMEDY}")
    return stacked, int(metadata["tokens"])


def statistics_file(path: Path) -> Path | None:
    """The KV statistics that a path names, itself or as a directory that has them; None where it has none."""
    file = path / STATISTICS_FILE if path.is_dir() else path
    return file if file.name == STATISTICS_FILE and file.is_file() else None
