"""What is kept of a run that was interrupted: how far it came, and its texts' hidden states there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvant.errors import ConfigError
from kvant.quantize.layer import LinearReport
from kvant.quantize.recipe import Recipe
from kvant.weights.save import save_whole

_FILE = "state.safetensors"


@dataclass(frozen=True)
class Streams:
    """Hidden states before a layer, [tokens, hidden] float32 for some texts each.

    Attributes:
        calibration: of the texts that layers are quantized on.
        original, quantized: of unseen text, after the layers as they were, and as they have become.
    """

    calibration: list[Tensor]
    original: list[Tensor]
    quantized: list[Tensor]


@dataclass(frozen=True)
class Unfinished:
    """A run before some layer.

    Attributes:
        layer: that comes next.
        reports: of those before.
        seconds: that the run took so far.
    """

    layer: int
    streams: Streams
    reports: tuple[LinearReport, ...]
    seconds: float

    def save(self, directory: Path, settings: Mapping[str, object]) -> None:
        """Keep it, in place of what was kept before.

        Raises:
            ConfigError: it cannot be written.
        """
        tensors = {
            f"{field.name}.{i}": hidden
            for field in dataclasses.fields(Streams)
            for i, hidden in enumerate(getattr(self.streams, field.name))
        }
        reports = [dataclasses.asdict(report) for report in self.reports]
        note = {"layer": self.layer, "reports": reports, "seconds": self.seconds, "settings": settings}
        save_whole(directory / _FILE, tensors, {"run": json.dumps(note)})

    @classmethod
    def load(cls, directory: Path, settings: Mapping[str, object]) -> Unfinished | None:
        """What was kept there; None where nothing was.

        Raises:
            ConfigError: it is of a run with other settings, or cannot be read.
        """
        path = directory / _FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                note = json.loads((file.metadata() or {})["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ConfigError(f"{directory} holds an unfinished run that cannot be read: {error}; remove it") from error
        _check(directory, note["settings"], settings)
        reports = tuple(LinearReport(**report) for report in note["reports"])
        return cls(note["layer"], _streams(tensors), reports, note["seconds"])

    @staticmethod
    def is_kept(directory: Path) -> bool:
        """Whether a run is kept there."""
        return (directory / _FILE).exists()

    @staticmethod
    def forget(directory: Path) -> None:
        """Remove what was kept."""
        (directory / _FILE).unlink(missing_ok=True)


def _check(directory: Path, kept: Mapping[str, object], settings: Mapping[str, object]) -> None:
    if kept != settings:
        changed = [name for name in settings if kept.get(name) != settings[name]]
        told = (
            f"{name}={kept.get(name)!r}" if name in dataclasses.asdict(Recipe()) else f"another {name}"
            for name in changed
        )
        raise ConfigError(
            f"{directory} holds an unfinished run with {', '.join(told)}; give the same to go on with it, or remove it"
        )


def _streams(tensors: Mapping[str, Tensor]) -> Streams:
    found: dict[str, list[Tensor]] = {field.name: [] for field in dataclasses.fields(Streams)}
    for name in sorted(tensors, key=lambda name: int(name.rpartition(".")[2])):
        found[name.rpartition(".")[0]].append(tensors[name])
    return Streams(**found)
