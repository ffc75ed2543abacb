"""Static scales of a KV cache, as every layout of a file holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from kvant.errors import ConfigError

Codes = Literal["int8", "fp8"]
CODE_DTYPES: Mapping[Codes, torch.dtype] = MappingProxyType({"int8": torch.int8, "fp8": torch.float8_e4m3fn})


def known_codes(name: object) -> Codes | None:
    """The codes that a file names; None where it names none of ours."""
    return "int8" if name == "int8" else "fp8" if name == "fp8" else None


@dataclass(frozen=True, eq=False)
class KVScales:
    """The step of every layer's keys and values: an element is `code * step`.

    Attributes:
        keys, values: for each layer [1], one step for all KV heads, or [kv_heads]; float32, finite and positive.
        codes: what the steps were measured for, where the file tells it. The largest magnitude is 127 steps of "int8"
            and 448 steps of "fp8" (e4m3).

    Raises:
        ConfigError: keys and values have not the same number of layers, or a step is not as it must be.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    codes: Codes | None = None

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values):
            raise ConfigError(f"scales for the keys of {len(self.keys)} layers, for the values of {len(self.values)}")
        for side, steps in (("keys", self.keys), ("values", self.values)):
            for layer, step in enumerate(steps):
                if flaw := flaw_of(step):
                    raise ConfigError(f"layer {layer}: the {side}' scale {step.tolist()} is {flaw}; measure it again")

    @property
    def num_layers(self) -> int:
        """Layers that have scales."""
        return len(self.keys)

    def shared(self) -> tuple[Tensor, ...]:
        """One step for keys and values alike, [1] or [kv_heads] for each layer: the larger, which clips neither."""
        return tuple(torch.maximum(key, value) for key, value in zip(self.keys, self.values, strict=True))

    def per_layer(self) -> KVScales:
        """One step for all KV heads: the largest, which clips none."""
        keys, values = (tuple(step.amax(0, keepdim=True) for step in side) for side in (self.keys, self.values))
        return KVScales(keys, values, self.codes)


def flaw_of(step: Tensor) -> str | None:
    """What is wrong with a step; None where nothing is."""
    if step.ndim != 1 or step.dtype != torch.float32:
        return "no vector of float32"
    if not step.isfinite().all():
        return "not finite"
    return None if (step > 0).all() else "not positive"
