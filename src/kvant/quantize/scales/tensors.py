"""Static KV scales as tensors of a checkpoint, under the names that different tools give them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from kvant.errors import ConfigError, CorruptModelError, UnsupportedModelError
from kvant.quantize.scales.kv_scales import Codes, KVScales, flaw_of, known_codes
from kvant.quantize.scales.ranks import join
from kvant.quantize.scales.scheme import (
    MODELOPT_FILE,
    SCHEME_FILE,
    compressed_tensors_scheme,
    declared_codes,
    modelopt_note,
)
from kvant.quantize.scales.writing import write_whole
from kvant.weights.sources.safetensors import open_safetensors, text_model_name

TensorLayout = Literal["compressed-tensors", "modelopt", "output-scale", "fused"]

SCALES_FILE = "kv_scales.safetensors"

# The names of a key's and a value's step, after "model.layers.N.self_attn.".
_WRITTEN: Mapping[TensorLayout, tuple[str, str]] = MappingProxyType(
    {
        "compressed-tensors": ("k_scale", "v_scale"),
        "modelopt": ("k_proj.k_scale", "v_proj.v_scale"),
        "output-scale": ("k_proj.output_scale", "v_proj.output_scale"),
        "fused": ("kv_scale", "kv_scale"),
    }
)
# In order of preference: a fused step is coarser than one for each side. The last is TensorRT-LLM's.
_READ = (
    ("k_scale", "v_scale"),
    ("attn.k_scale", "attn.v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("qkv_proj.k_scale", "qkv_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("kv_scale", "kv_scale"),
    ("kv_cache_scaling_factor", "kv_cache_scaling_factor"),
)
_OFFSETS = ("k_zero_point", "v_zero_point", "k_proj.k_bias", "v_proj.v_bias")
_ATTENTION = re.compile(r"(?:model|transformer)\.(?:layers|h)\.(\d{1,6})\.(?:self_attn|attention|attn)\.(.+)")
_RANK = re.compile(r"rank(\d{1,4})\.safetensors")

Found = dict[int, dict[str, Tensor]]


def read_tensors(files: Sequence[Path], num_layers: int, num_kv_heads: int) -> KVScales | None:
    """The scales of a checkpoint's safetensors files, of which nothing else is read; None where they hold none.

    TensorRT-LLM's rank0.safetensors, rank1.safetensors ... each hold the scales of one tensor-parallel rank.

    Raises:
        CorruptModelError: scales are missing for a layer, have a shape or a value that no scale has.
        UnsupportedModelError: the scales are for another kind of quantization.
    """
    ranks = [_constants(group) for group in _by_rank(files)]
    if not any(ranks):
        return None
    source = files[0] if len(files) == 1 else files[0].parent
    _check_number(ranks, num_layers, source)

    def steps(side: int) -> tuple[Tensor, ...]:
        places = [f"{source}: layer {layer}" for layer in range(num_layers)]
        parts = [[_step(rank.get(layer, {}), side, at) for rank in ranks] for layer, at in enumerate(places)]
        return tuple(join(part, num_kv_heads, at) for part, at in zip(parts, places, strict=True))

    written = known_codes((open_safetensors(files[0]).metadata() or {}).get("codes"))
    return KVScales(steps(0), steps(1), written or declared_codes(files[0].parent))


def write_tensors(directory: Path, scales: KVScales, layout: TensorLayout) -> None:
    """Write kv_scales.safetensors, and what the layout's readers want to be told, to be put beside a checkpoint.

    "compressed-tensors": kv_cache_scheme.json holds the entry "quantization_config" for the checkpoint's config.json.
    "modelopt": hf_quant_config.json. A checkpoint with an index must name the tensors in its "weight_map" as well;
    kvant reads the file without that.

    Raises:
        ConfigError: the layout has no place for these scales, or a file cannot be written.
    """
    tensors = scale_tensors(scales, layout)
    per_head = any(tensor.numel() > 1 for tensor in tensors.values())
    for name, note in _notes(layout, scales.codes, per_head=per_head).items():
        write_whole(directory / name, (json.dumps(note, indent=2) + "\n").encode())
    codes = {} if scales.codes is None else {"codes": scales.codes}
    write_whole(directory / SCALES_FILE, save(tensors, metadata={"format": "pt", **codes}))


def _notes(layout: TensorLayout, codes: Codes | None, *, per_head: bool) -> dict[str, dict[str, Any]]:
    """The JSON files that go with the tensors."""
    if layout not in ("compressed-tensors", "modelopt"):
        return {}
    if codes is None:
        raise ConfigError(f"the layout {layout!r} tells whether scales are for int8 or fp8; set KVScales.codes")
    if layout == "modelopt":
        return {MODELOPT_FILE: modelopt_note(codes)}
    return {SCHEME_FILE: compressed_tensors_scheme(codes, per_head=per_head)}


def scale_tensors(scales: KVScales, layout: TensorLayout) -> dict[str, Tensor]:
    """The scales under the names of a layout, [1] or, in "compressed-tensors" alone, [kv_heads].

    Where keys and values differ, "fused" holds the larger step.

    Raises:
        ConfigError: the layout holds one step a layer, and these scales have one for each KV head.
    """
    key_name, value_name = _WRITTEN[layout]
    keys, values = (scales.shared(),) * 2 if layout == "fused" else (scales.keys, scales.values)
    size = max((step.numel() for step in (*keys, *values)), default=1)
    if layout != "compressed-tensors" and size > 1:
        raise ConfigError(
            f"the layout {layout!r} holds one scale a layer, these are one for each KV head; write "
            "'compressed-tensors', or give one scale a layer (--per-tensor, KVScales.per_layer())"
        )
    tensors: dict[str, Tensor] = {}
    for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
        prefix = f"model.layers.{layer}.self_attn."
        # One strategy holds for all layers: where some have a step for each head, all have.
        tensors |= {prefix + key_name: key.expand(size).clone(), prefix + value_name: value.expand(size).clone()}
    return tensors


def _by_rank(files: Sequence[Path]) -> list[list[Path]]:
    """The files of each tensor-parallel rank: all of them belong to one, unless their names tell ranks."""
    matches = [_RANK.fullmatch(file.name) for file in files]
    if not all(matches):
        return [list(files)]
    numbered = {int(match[1]): file for match, file in zip(matches, files, strict=True) if match}
    missing = next((rank for rank in range(len(files)) if rank not in numbered), None)
    if missing is not None:
        raise CorruptModelError(f"{files[0].parent}: rank{missing}.safetensors is missing; the copy may be incomplete")
    return [[numbered[rank]] for rank in range(len(files))]


def _constants(files: Iterable[Path]) -> Found:
    """Every layer's scales and offsets, by the name within the layer's attention."""
    wanted = {name for pair in _READ for name in pair} | set(_OFFSETS)
    found: Found = {}
    for path in files:
        file: Any = open_safetensors(path)
        for stored in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            match = _ATTENTION.fullmatch(text_model_name(stored))
            if match and match[2] in wanted:
                found.setdefault(int(match[1]), {})[match[2]] = file.get_tensor(stored)
    return {layer: constants for layer, constants in found.items() if not set(_OFFSETS).issuperset(constants)}


def _step(constants: Mapping[str, Tensor], side: int, where: str) -> Tensor:
    """The step of keys (side 0) or values (side 1): a scalar or a vector, float32."""
    pair = next((pair for pair in _READ if pair[0] in constants or pair[1] in constants), None)
    if pair is None or pair[side] not in constants:
        what = "keys" if side == 0 else "values"
        raise CorruptModelError(
            f"{where} has no scale for {what}; the checkpoint is incomplete, fetch or make it again"
        )
    if any(constants[name].float().any() for name in _OFFSETS if name in constants):
        raise UnsupportedModelError(f"{where} has zero points; kvant reads symmetric scales, calibrate for these")
    step, name = constants[pair[side]], pair[side]
    if not step.is_floating_point() or not step.numel() or max(step.shape, default=1) != step.numel():
        raise CorruptModelError(
            f"{where}: {name} is {step.dtype} of shape {list(step.shape)}; a scale is one floating-point number, or "
            "one for each KV head"
        )
    step = step.to(torch.float32).flatten()
    if flaw := flaw_of(step):
        raise CorruptModelError(f"{where}: {name} is {flaw}; calibrate the model again")
    return step if step.numel() > 1 else step[0]


def _check_number(ranks: Iterable[Found], num_layers: int, source: Path) -> None:
    last = max((layer for rank in ranks for layer in rank), default=0)
    if last >= num_layers:
        raise CorruptModelError(
            f"{source} has scales for layer {last}, the model has {num_layers} layers; use the scales that were made "
            "for this model"
        )
