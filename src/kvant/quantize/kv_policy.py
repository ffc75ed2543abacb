"""Which layer keeps its KV in which format: what a config and its policy file wish for, settled for one model.

A policy file is JSON. Both keys may be left out:

    {"default": "int4", "layers": {"0": "int8", "20-23": "fp16", "-1": "fp16", "sliding_window": "int8"}}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvant.config import SLIDING_WINDOW, EngineConfig, parse_layers
from kvant.errors import ConfigError
from kvant.formats.kv import KVFormat, KVPlan, LayerPlan, resolve_kv_format
from kvant.models.spec import ModelSpec

_KEYS = ("default", "layers")
_EXAMPLE = '{"default": "int4", "layers": {"0": "fp16"}}'


@dataclass(frozen=True)
class _Wish:
    """A format for the layers that an entry of a layer list names; `where` is the entry's place, for errors."""

    where: str
    entry: int | str
    format: KVFormat


def resolve_layer_formats(config: EngineConfig, spec: ModelSpec, compute_dtype: torch.dtype) -> KVPlan:
    """Every layer's format by `kv_cache_dtype`, `kv_cache_dtype_skip_layers` and `kv_cache_policy`.

    A layer's format is the one that an index or a range gives it, else that of "sliding_window" if it has a window,
    else the default. It does not matter which of the two settings has the entry.

    Args:
        config: the engine's.
        spec: the model's.
        compute_dtype: decides which 16-bit type "auto" is.

    Returns:
        A plan without statistics, with a name such as "int4 (layers 0, 20-23: fp16)".

    Raises:
        ConfigError: the file cannot be read or is no policy, an entry names no layer of this model, a format is
            unknown, or two entries of the same rank give one layer different formats.
    """
    policy = {} if config.kv_cache_policy is None else _read_policy(Path(config.kv_cache_policy))
    default = _default(config, policy, compute_dtype)
    wishes = [*_skips(config, compute_dtype), *_policy_wishes(config, policy, compute_dtype)]
    by_window = _settle((wish for wish in wishes if wish.entry == SLIDING_WINDOW), spec)
    by_index = _settle((wish for wish in wishes if wish.entry != SLIDING_WINDOW), spec)
    chosen = by_window | by_index
    formats = [chosen.get(layer, default) for layer in range(len(spec.layers))]
    return KVPlan(_plan_name(formats, default), tuple(LayerPlan(fmt) for fmt in formats))


def _read_policy(path: Path) -> dict[str, Any]:
    """The file's content: known keys only, layers an object."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # not UTF-8, no home of ~user
        raise ConfigError(f"kv_cache_policy: {path} cannot be read: {error}; give a file with {_EXAMPLE}") from error
    try:
        policy = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"kv_cache_policy: {path} is not valid JSON: {error}; write it like {_EXAMPLE}") from error
    if not isinstance(policy, dict) or not isinstance(policy.get("layers", {}), dict):
        raise ConfigError(f"kv_cache_policy: {path} must hold an object, and so must its layers, like {_EXAMPLE}")
    unknown = next((key for key in policy if key not in _KEYS), None)
    if unknown is not None:
        raise ConfigError(f"kv_cache_policy: {path}: {unknown!r} is no key of a policy; it has {' and '.join(_KEYS)}")
    return policy


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a later key silently replace an earlier one."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def _default(config: EngineConfig, policy: Mapping[str, Any], compute_dtype: torch.dtype) -> KVFormat:
    """The policy's default where it has one, else kv_cache_dtype; they must not contradict each other."""
    wanted = resolve_kv_format(config.kv_cache_dtype, compute_dtype)
    if "default" not in policy:
        return wanted
    default = _format(policy["default"], f"kv_cache_policy: {config.kv_cache_policy}: default", compute_dtype)
    if config.kv_cache_dtype != "auto" and default != wanted:
        raise ConfigError(
            f"kv_cache_policy: {config.kv_cache_policy}: default {policy['default']!r} contradicts "
            f"kv_cache_dtype={config.kv_cache_dtype!r}; leave one of them out"
        )
    return default


def _skips(config: EngineConfig, compute_dtype: torch.dtype) -> list[_Wish]:
    half = resolve_kv_format("auto", compute_dtype)
    entries = config.kv_cache_dtype_skip_layers
    return [_Wish(f"kv_cache_dtype_skip_layers: {entry!r}", entry, half) for entry in entries]


def _policy_wishes(config: EngineConfig, policy: Mapping[str, Any], compute_dtype: torch.dtype) -> list[_Wish]:
    wishes = []
    for entry, name in policy.get("layers", {}).items():
        where = f"kv_cache_policy: {config.kv_cache_policy}: layers: {entry!r}"
        wishes.append(_Wish(where, entry, _format(name, where, compute_dtype)))
    return wishes


def _format(name: Any, where: str, compute_dtype: torch.dtype) -> KVFormat:
    if not isinstance(name, str):
        raise ConfigError(f"{where}: {name!r} is no name of a format; write one in quotes, such as 'int8'")
    try:
        return resolve_kv_format(name, compute_dtype)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _settle(wishes: Iterable[_Wish], spec: ModelSpec) -> dict[int, KVFormat]:
    """The format of each layer that is wished for by wishes of one rank."""
    settled: dict[int, _Wish] = {}
    for wish in wishes:
        for layer in _layers(wish, spec):
            other = settled.setdefault(layer, wish)
            if other.format != wish.format:
                raise ConfigError(
                    f"{wish.where} ({wish.format.name}) and {other.where} ({other.format.name}) give layer {layer} "
                    "different formats; leave one of them out"
                )
    return {layer: wish.format for layer, wish in settled.items()}


def _layers(wish: _Wish, spec: ModelSpec) -> Sequence[int]:
    ends = parse_layers(wish.entry, wish.where)
    if ends is None:
        windowed = [number for number, layer in enumerate(spec.layers) if layer.window is not None]
        if not windowed:
            raise ConfigError(f"{wish.where}: no layer of this model has a window; leave it out")
        return windowed
    count = len(spec.layers)
    for end in ends:
        if not -count <= end < count:
            raise ConfigError(f"{wish.where}: there is no layer {end}; this model has layers 0 to {count - 1}")
    first, last = (end % count for end in ends)
    if first > last:
        raise ConfigError(f"{wish.where}: layer {first} comes after layer {last}; write the range from low to high")
    return range(first, last + 1)


def _plan_name(formats: Sequence[KVFormat], default: KVFormat) -> str:
    """Such as "int4 (layers 0, 20-23: fp16)": the default, or what most layers have, and the layers apart from it."""
    layers: dict[str, list[int]] = {}
    for layer, fmt in enumerate(formats):
        layers.setdefault(fmt.name, []).append(layer)
    usual = default.name if default.name in layers else max(layers, key=lambda name: len(layers[name]))
    del layers[usual]
    apart = [f"layer{'s' * (len(some) > 1)} {_runs(some)}: {name}" for name, some in layers.items()]
    return f"{usual} ({'; '.join(apart)})" if apart else usual


def _runs(numbers: Sequence[int]) -> str:
    """Rising numbers, neighbours drawn together: "0, 4-6"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
