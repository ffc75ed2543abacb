"""A checkpoint repacked once for a backend: see `weights.workspace`."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from kvant.errors import ConfigError
from kvant.formats.weight import PackedWeight
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.ops import Ops
from kvant.kernels.reference import ReferenceOps
from kvant.models.families import model_spec
from kvant.models.layers import Linear
from kvant.models.spec import ModelSpec
from kvant.text.save import save_tokenizer
from kvant.weights.load import WeightLoader, check_places, compute_dtype
from kvant.weights.matrices import MatrixReader, Rounding
from kvant.weights.parallel import Rank
from kvant.weights.source import TensorSource
from kvant.weights.stored import Piece, layer_pieces, linear_pieces
from kvant.weights.tokenizer import read_tokenizer
from kvant.weights.workspace import LAYOUTS, Made, ShardWriter, WorkspaceSource, write_header

Backend = Literal["cpu", "cuda"]
Progress = Callable[[int, int], None]

_OURS = re.compile(r"rank-\d+\.bin|(workspace|tokenizer|tokenizer_config|generation_config)\.json")


def silent(done: int, total: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Target:
    """What a checkpoint is converted to.

    Attributes:
        backend: "cpu", the memory of the native kernels; or "cuda", the planes of `PackedWeight`.
        tp: ranks that the model is cut for.
        dtype, weights: as `load_model` takes them; they cannot be changed afterwards.
    """

    backend: Backend = "cpu"
    tp: int = 1
    dtype: str = "auto"
    weights: str | Rounding = "auto"


def convert(
    source: TensorSource,
    directory: Path,
    target: Target,
    ops: Ops,
    *,
    generation: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> None:
    """Write a checkpoint as a workspace. Until it is whole, it lies in a directory beside, named `.partial`.

    Args:
        source: an open checkpoint.
        directory: does not exist yet.
        target: what to convert to.
        ops: those that the native layout is for; of no matter to the others.
        generation: sampling settings beside those of the checkpoint, which come first.
        progress: called with the layers that are done, and how many there are.

    Raises:
        ConfigError: the directory exists, cannot be written, or the model cannot be cut so.
        KvantError: as `load_model` does.
    """
    if isinstance(source, WorkspaceSource):
        raise ConfigError(f"{source.path} is a converted model; convert the one that it was made from")
    if directory.exists():
        raise ConfigError(f"{directory} exists; remove it, or choose another place")
    writer = _writer(source, target, ops)
    partial = directory.with_name(directory.name + ".partial")
    try:
        _clear(partial)
        partial.mkdir(parents=True)
        try:
            _write_text(source, partial, {**(generation or {}), **source.generation})
            writer.write(partial, progress)
            partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"{directory} cannot be written: {error}; make room there, or choose another place"
        ) from error


def _clear(partial: Path) -> None:
    """Take away what a conversion left that was killed; something else may be somebody's work."""
    if not partial.exists():
        return
    if foreign := sorted(path.name for path in partial.iterdir() if not _OURS.fullmatch(path.name)):
        raise ConfigError(
            f"{partial}, where the conversion is to be written first, holds {foreign[0]!r}, which no conversion left; "
            "remove that directory, or choose another place"
        )
    shutil.rmtree(partial)


def _write_text(source: TensorSource, directory: Path, generation: Mapping[str, Any]) -> None:
    save_tokenizer(read_tokenizer(source), directory)
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")


class _AsRead(ReferenceOps):
    """Lets the loader read, name and fuse, and keeps what it has read as it is: it is yet to be cut."""

    packed_weights = True

    def prepare(self, weight: PackedWeight) -> PackedWeight:
        return weight


def _writer(source: TensorSource, target: Target, ops: Ops) -> _Writer:
    """Everything that can be told without the weights is checked."""
    native = target.backend == "cpu"
    if native and not isinstance(ops, CpuOps):
        raise ConfigError(
            "the native kernels, which a model for --backend cpu is packed for, are not here or switched off "
            "(KVANT_CPU_ISA=reference); `kvant env` tells more"
        )
    spec = model_spec(source.config)
    ranks = tuple(Rank(index, target.tp, spec) for index in range(target.tp))
    matrices = MatrixReader(source, torch.float32, target.weights, packed=True)
    dtype = compute_dtype(target.dtype, spec, matrices, ops.device) if native else _device_dtype(target.dtype, spec)
    loader = WeightLoader(source, spec, replace(matrices, dtype=dtype), _AsRead())
    name = target.weights.name if isinstance(target.weights, Rounding) else target.weights
    dtype_name = str(dtype).removeprefix("torch.")
    made = Made(target.backend, LAYOUTS[target.backend], target.tp, dtype_name, name, source.num_parameters())
    return _Writer(loader, ranks, made, ops.prepare if native else PackedWeight.planar)


def _device_dtype(name: str, spec: ModelSpec) -> torch.dtype:
    """A device computes in 16 bit where nobody asks for more."""
    stored = "bfloat16" if spec.dtype == "float32" else spec.dtype
    found: torch.dtype = getattr(torch, stored if name == "auto" else name)
    return found


@dataclass(frozen=True)
class _Writer:
    """Reads piece by piece, and writes each rank's part of it."""

    loader: WeightLoader
    ranks: tuple[Rank, ...]
    made: Made
    prepare: Callable[[PackedWeight], Any]

    def write(self, directory: Path, progress: Progress) -> None:
        """The shards, then the header."""
        with ExitStack() as stack:
            shards = [ShardWriter(directory / f"rank-{rank.index}.bin") for rank in self.ranks]
            for shard in shards:
                stack.callback(shard.abandon)
            self._write_pieces(shards, progress)
            check_places(self.loader.source, self.loader.source.unread())
            entries = [shard.finish() for shard in shards]
        write_header(directory, self.made, self.loader.source.config, entries)

    def _write_pieces(self, shards: list[ShardWriter], progress: Progress) -> None:
        loader, count = self.loader, len(self.loader.spec.layers)
        embedding, norm = Linear(loader.embedding()), loader.norm()
        for rank, shard in zip(self.ranks, shards, strict=True):
            self._add(shard, "", {"embedding": rank.vocabulary(embedding).weight, "norm": norm})
        if not loader.spec.tied_embeddings:
            head = loader.head()
            for rank, shard in zip(self.ranks, shards, strict=True):
                self._add(shard, "", linear_pieces("head", rank.vocabulary(head)))
        for index in range(count):
            progress(index, count)
            layer = loader.layer(index)
            for rank, shard in zip(self.ranks, shards, strict=True):
                self._add(shard, f"layers.{index}.", layer_pieces(rank.layer(layer)))
        progress(count, count)

    def _add(self, shard: ShardWriter, prefix: str, pieces: Mapping[str, Piece]) -> None:
        for name, piece in pieces.items():
            shard.add(prefix + name, self.prepare(piece) if isinstance(piece, PackedWeight) else piece)
