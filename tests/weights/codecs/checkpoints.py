"""Miniature checkpoints whose modules are quantized, each beside a dense one of the same values."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.engine.checkpoint import write_checkpoint
from tests.weights.codecs.random_modules import Made

# (module's name, rows, columns) -> its stored tensors and values; None leaves it dense.
Make = Callable[[str, int, int], Made | None]


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of one model."""

    quantized: Path
    dense: Path


def quantize(pair: Pair, make: Make, note: dict[str, Any] | None) -> Pair:
    """Turn `pair.dense`, a whole checkpoint, into the pair.

    Embeddings stay dense; modules become what `make` says, in the quantized checkpoint and in the dense one.
    """
    dense = load_file(pair.dense / "model.safetensors")
    stored = dict(dense)
    for name, weight in dense.items():
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or "embed" in name or "wte" in name or not (made := make(module, *weight.shape)):
            continue
        del stored[name]
        dense[name] = made[1]
        stored |= {f"{module}.{part}": tensor.contiguous() for part, tensor in made[0].items()}
    pair.quantized.mkdir(parents=True, exist_ok=True)
    for path, tensors in ((pair.dense, dense), (pair.quantized, stored)):
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((pair.dense / "config.json").read_text())
    config |= {} if note is None else {"quantization_config": note}
    (pair.quantized / "config.json").write_text(json.dumps(config))
    return pair


def llama(directory: Path, make: Make, note: dict[str, Any] | None, **changes: Any) -> Pair:
    """The pair of the miniature Llama."""
    pair = Pair(directory / "quantized", write_checkpoint(directory / "dense", **changes))
    return quantize(pair, make, note)
