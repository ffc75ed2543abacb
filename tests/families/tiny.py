"""Miniature checkpoints on disk: random weights in which every tensor matters, and a text long enough to show it."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families.configs import ORACLES
from tests.families.configs.base import Tiny
from tests.families.reference import OracleReference, Reference, TransformersReference

GAIN = 1.5  # weights are GAIN / sqrt(inputs): scores of a few units, attention far from uniform


@dataclass(frozen=True)
class Checkpoint:
    """A miniature model: its reference, the same weights on disk, and a text.

    Attributes:
        published: a directory with config.json as published.
        layouts: that directory and, where transformers has the family, another as its `save_pretrained` writes it.
        ids: the text.
    """

    tiny: Tiny
    reference: Reference
    published: Path
    layouts: tuple[Path, ...]
    ids: list[int]


def build(tiny: Tiny, directory: Path) -> Checkpoint:
    """Write the checkpoint under `directory`."""
    generator = torch.Generator().manual_seed(zlib.crc32(tiny.name.encode()))
    reference = reference_of(tiny)
    for name, weight in reference.weights.items():
        _randomize(name, weight, tiny, generator)
    published, saved = directory / "published", directory / "saved"
    published.mkdir(parents=True)
    layouts, weights = (published,), reference.weights
    if isinstance(reference, TransformersReference):
        reference.model.save_pretrained(saved)
        layouts, weights = (published, saved), load_file(saved / "model.safetensors")
    stale = {name: torch.full((8,), float("nan")) for name in tiny.stale}
    save_file(weights | stale, published / "model.safetensors", metadata={"format": "pt"})
    (published / "config.json").write_text(json.dumps(tiny.config, indent=2))
    vocab = tiny.config.get("vocab_size") or tiny.config["text_config"]["vocab_size"]
    ids = torch.randint(3, min(vocab, 120), (tiny.length,), generator=generator).tolist()
    return Checkpoint(tiny, reference, published, layouts, ids)


def reference_of(tiny: Tiny) -> Reference:
    """The family's oracle where there is one, else transformers."""
    oracle = ORACLES.get(tiny.config["model_type"])
    return OracleReference(oracle, tiny.config) if oracle else TransformersReference(tiny.config)


def _randomize(name: str, weight: Tensor, tiny: Tiny, generator: torch.Generator) -> None:
    """In place. Norms spread around the value they start from: 1, or 0 where a family stores w - 1."""
    noise = torch.randn(weight.shape, generator=generator)
    if name.endswith(".bias"):
        weight.copy_(noise * tiny.bias_std)
    elif weight.dim() == 1:
        weight.add_(noise * 0.3)
    else:
        weight.copy_(noise * GAIN / weight.shape[-1] ** 0.5)
