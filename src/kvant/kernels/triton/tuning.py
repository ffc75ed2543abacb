"""Which launch configuration is the fastest on which card: tables that were measured, and are kept beside the kernels.

A table is a JSON file, `tuned/<card>.json`: {op: {key: {"blocks": {name: size}, "num_warps": n, "num_stages": n}}}. An
op is the name of the module that has its kernel; what of a launch its best configuration depends on is in the key,
which the module makes: `key`, `default` and `candidates` there take the same arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from kvant.errors import ConfigError
from kvant.kernels.triton.launch import Config

TABLES = Path(__file__).with_name("tuned")


def card_name(device_name: str) -> str:
    """A card as files are called after it: "NVIDIA H200" is "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


@dataclass(frozen=True)
class Tuning:
    """The configurations known for one card, by op and key."""

    configs: Mapping[str, Mapping[str, Config]] = field(default_factory=dict)

    @classmethod
    def of(cls, device_name: str, tables: Path = TABLES) -> Tuning:
        """The table of a card, named as CUDA names it; an empty one where nothing was measured.

        Raises:
            ConfigError: the file is not such a table.
        """
        path = tables / f"{card_name(device_name)}.json"
        return cls.read(path) if path.is_file() else cls()

    @classmethod
    def read(cls, path: Path) -> Tuning:
        """The table in a file.

        Raises:
            ConfigError: the file is not such a table.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                {op: {key: _config(entry) for key, entry in keys.items()} for op, keys in document.items()},
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path} is no table of launch configurations ({error!r}); delete it, or write it again with "
                "benchmarks/gpu/run_all.py"
            ) from error

    def lookup(self, op: str, key: str) -> Config | None:
        """The best configuration; None where it was not measured."""
        return self.configs.get(op, {}).get(key)

    def pick(self, kernel: ModuleType, *args: Any) -> Config:
        """The best configuration for a launch, or its default: `args` are those of the module's `key` and `default`."""
        op = kernel.__name__.rpartition(".")[2]
        known = self.lookup(op, kernel.key(*args)) if op in self.configs else None
        config: Config = known or kernel.default(*args)
        return config

    def write(self, path: Path) -> None:
        """Write the table, in an order that depends on nothing but its content."""
        document = {op: {key: asdict(config) for key, config in keys.items()} for op, keys in self.configs.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _config(entry: Mapping[str, Any]) -> Config:
    blocks = {str(name): int(size) for name, size in entry["blocks"].items()}
    return Config(blocks, num_warps=int(entry["num_warps"]), num_stages=int(entry["num_stages"]))
