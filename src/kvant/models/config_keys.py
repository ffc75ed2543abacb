"""Reading config.json: the keys that mean the same in every family, in the styles that checkpoints use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvant.errors import CorruptModelError, UnsupportedModelError
from kvant.models.spec import RopeSpec

Config = Mapping[str, Any]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}


def number(config: Config, *keys: str, default: float | None = None) -> Any:
    """The first of these keys that is present and not null, else the default.

    Raises:
        CorruptModelError: none is there and there is no default, or the value is no number.
    """
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CorruptModelError(f"config.json: {' or '.join(keys)} is {value!r}, a number was expected")
    return value


def activation(config: Config, *, gelu_means_tanh: bool = False) -> str:
    """The gated activation under the name that the ops use."""
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if name not in _ACTIVATIONS:
        raise UnsupportedModelError(f"activation {name!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
    known = _ACTIVATIONS[name]
    return "gelu_tanh" if gelu_means_tanh and known == "gelu" else known


def token_ids(config: Config, key: str) -> tuple[int, ...]:
    """A token id, a list of them or nothing, as a tuple."""
    value = config.get(key)
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (int(value),)


def rope_parameters(config: Config, layer_type: str = "full_attention") -> Config:
    """The rope settings in the newer style: one mapping with rope_type and rope_theta."""
    params = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if isinstance(params.get(layer_type), Mapping):
        params = dict(params[layer_type])
    params.setdefault("rope_type", params.get("type", "default"))
    if params.get("rope_theta") is None:
        params["rope_theta"] = number(config, "rope_theta", default=10000.0)
    return params


def rope(config: Config, head_dim: int, params: Config | None = None) -> RopeSpec:
    """The rotary embedding that a config asks for.

    Raises:
        UnsupportedModelError: a scaling rule that kvant does not know.
    """
    params = rope_parameters(config) if params is None else params
    fraction = params.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    dim = int(head_dim * (1.0 if fraction is None else fraction))
    limit = int(number(config, "max_position_embeddings", default=2048))
    original = int(number({**config, **params}, "original_max_position_embeddings", default=limit))
    plain = RopeSpec(dim=dim, theta=float(params["rope_theta"]))
    scaled = replace(plain, factor=float(number(params, "factor", default=1.0)), original_length=original)
    match params["rope_type"]:
        case "default" | None:
            return plain
        case "linear":
            return replace(scaled, kind="linear")
        case "dynamic":
            return replace(scaled, kind="dynamic", original_length=limit)
        case "yarn":
            return _yarn(params, scaled)
        case "llama3":
            low, high = (float(number(params, f"{side}_freq_factor")) for side in ("low", "high"))
            return replace(scaled, kind="llama3", low_freq_factor=low, high_freq_factor=high)
        case "longrope" | "su":
            return _longrope(params, replace(plain, original_length=original), limit)
        case kind:
            raise UnsupportedModelError(f"rope scaling {kind!r} is not supported by kvant")


def _yarn(params: Config, rope: RopeSpec) -> RopeSpec:
    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    attention_factor = params.get("attention_factor")
    if attention_factor is None:
        mscale, all_dim = params.get("mscale"), params.get("mscale_all_dim")
        attention_factor = scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)
    return replace(
        rope,
        kind="yarn",
        attention_factor=float(attention_factor),
        beta_fast=float(params.get("beta_fast") or 32),
        beta_slow=float(params.get("beta_slow") or 1),
        truncate=bool(params.get("truncate", True)),
    )


def _longrope(params: Config, rope: RopeSpec, limit: int) -> RopeSpec:
    original = rope.original_length
    factor = limit / original
    attention_factor = params.get("attention_factor")
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = tuple(map(float, params["short_factor"])), tuple(map(float, params["long_factor"]))
    if not len(short) == len(long) == rope.dim // 2:
        raise CorruptModelError(f"config.json: longrope needs {rope.dim // 2} short and long factors")
    return replace(
        rope,
        kind="longrope",
        attention_factor=float(attention_factor),
        short_factors=short,
        long_factors=long,
    )


def max_position(config: Config, params: Config) -> int:
    """The longest context meant: the stated one, or the original one times the scaling factor."""
    limit = int(number(config, "max_position_embeddings", default=2048))
    if params["rope_type"] not in ("linear", "dynamic", "yarn"):
        return limit
    original = int(number({**config, **params}, "original_max_position_embeddings", default=limit))
    return max(limit, int(original * number(params, "factor", default=1.0)))


def windows(config: Config, num_layers: int, sliding: Any) -> tuple[int | None, ...]:
    """Each layer's attention window: from layer_types where the config lists them, else where `sliding(layer)`."""
    size = config.get("sliding_window")
    types = config.get("layer_types")
    if not size or (types is None and config.get("use_sliding_window") is False):
        return (None,) * num_layers
    if types is not None and len(types) != num_layers:
        raise CorruptModelError(f"config.json lists {len(types)} layer_types for {num_layers} layers")
    if types is not None:
        return tuple(int(size) if kind == "sliding_attention" else None for kind in types)
    return tuple(int(size) if sliding(layer) else None for layer in range(num_layers))
