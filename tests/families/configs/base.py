"""What a miniature is, and what all have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Tiny:
    """One miniature model.

    Attributes:
        name: the release whose config this is in small, or what is particular about it.
        config: as published (transformers 4 style where transformers has the family).
        length: tokens of the text; longer than windows and original contexts.
        prompts: prompt lengths from which generation is checked; () stands for the whole text.
        bites: changes of the config that a text of this length must feel: proof that what they undo is exercised.
        bias_std: of the random biases.
        stale: names of tensors that old checkpoints carry and that mean nothing.
    """

    name: str
    config: Config
    length: int = 40
    prompts: tuple[int, ...] = ()
    bites: tuple[Config, ...] = ()
    bias_std: float = 0.5
    stale: tuple[str, ...] = ()


SIZES: Config = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.02,
    "use_cache": True,
    "transformers_version": "4.45.0",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

NO_SCALING: Config = {"rope_scaling": None}
# Old checkpoints carry these, and nobody reads them.
INV_FREQ = tuple(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(3))


def without(config: Config, *keys: str) -> Config:
    """The config without these keys."""
    return {key: value for key, value in config.items() if key not in keys}
