"""Static KV scales from and to files, whatever their layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvant.errors import ConfigError, CorruptModelError, ModelNotFoundError, UnsupportedModelError
from kvant.models.config_keys import number
from kvant.models.families import model_spec
from kvant.quantize.scales.kv_scales import KVScales
from kvant.quantize.scales.param_file import PARAM_FILE, read_param_file, write_param_file
from kvant.quantize.scales.tensors import SCALES_FILE, TensorLayout, read_tensors, write_tensors
from kvant.weights.sources.safetensors import read_json, safetensors_files

Layout = Literal["vllm"] | TensorLayout


@dataclass(frozen=True)
class CacheSizes:
    """What a checkpoint's config says of its KV cache."""

    num_layers: int
    num_kv_heads: int
    model_type: str | None


def read_scales(path: Path, num_layers: int, num_kv_heads: int) -> KVScales:
    """The static scales of a model of this many layers and KV heads.

    A path is a .json file such as kv_cache_scales.json, a .safetensors file, or a directory. Of a directory,
    kv_scales.safetensors is taken, else the scales among the checkpoint's own tensors, else kv_cache_scales.json.
    Weights are not read, and may be quantized in any way.

    Raises:
        ConfigError: the path holds no scales.
        CorruptModelError: the scales are not whole, or not this model's.
        UnsupportedModelError: they are for another kind of quantization.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist; name a {PARAM_FILE}, a safetensors file or a model's directory")
    if path.suffix == ".json" and path.is_file():
        return read_param_file(path, num_layers, num_kv_heads)
    scales = read_tensors(_tensor_files(path), num_layers, num_kv_heads)
    if scales is not None:
        return scales
    if (path / PARAM_FILE).is_file():
        return read_param_file(path / PARAM_FILE, num_layers, num_kv_heads)
    raise ConfigError(
        f"{path} holds no static KV scales: no tensors such as model.layers.0.self_attn.k_scale, and no {PARAM_FILE}"
    )


def _tensor_files(path: Path) -> list[Path]:
    if path.is_dir():
        return [path / SCALES_FILE] if (path / SCALES_FILE).is_file() else safetensors_files(path)
    if path.suffix == ".safetensors":
        return [path]
    raise ConfigError(f"{path}: KV scales are read from a .json file, a .safetensors file or a model's directory")


def write_scales(
    directory: Path, scales: KVScales, layout: Layout, *, model_type: str | None = None, tp_size: int = 1
) -> None:
    """Write scales into a directory so that the readers of a layout, and `read_scales`, find them there.

    The directory may be a new one or a checkpoint's own, whose weights and config.json stay as they are. The layout
    "vllm" is kv_cache_scales.json, with one step for keys and values; it alone needs the model's type and its number of
    tensor-parallel ranks (see `write_param_file`). The others are tensors in kv_scales.safetensors, with a note beside
    them (see `write_tensors`).

    Raises:
        ConfigError: the layout has no place for these scales, or a file cannot be written.
    """
    if layout == "vllm":
        write_param_file(directory / PARAM_FILE, scales, model_type=model_type, tp_size=tp_size)
    else:
        write_tensors(directory, scales, layout)


def cache_sizes(directory: Path) -> CacheSizes:
    """The sizes of the cache that a checkpoint's scales are for; its architecture need not be one that kvant runs.

    Raises:
        ModelNotFoundError: the directory has no config.json.
        CorruptModelError: config.json does not tell the sizes.
    """
    config = read_json(directory / "config.json")
    if not config:
        raise ModelNotFoundError(f"{directory} holds no config.json; name the directory of a quantized model")
    config = {**config, **(config.get("text_config") or {})}
    model_type = config.get("model_type")
    try:
        spec = model_spec(config)
        return CacheSizes(len(spec.layers), spec.num_kv_heads, model_type)
    except (UnsupportedModelError, CorruptModelError):
        layers = number(config, "num_hidden_layers", "n_layer")
        heads = number(config, "num_key_value_heads", "num_attention_heads", "n_head")
        return CacheSizes(int(layers), int(heads), model_type)
