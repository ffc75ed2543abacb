"""How an engine keeps its KV: each layer's format, and the constants that the formats work with.

Where they come from, in this order: `quantization_param_path`, the cache of what was measured before, or a text that
kvant brings and the model now reads.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from kvant.config import EngineConfig
from kvant.errors import ConfigError
from kvant.formats.kv import KVPlan, LayerPlan
from kvant.formats.kv_codecs import ShapedCodec, StaticCodec, VectorCodec
from kvant.formats.kv_stats import NO_STATS, LayerStats
from kvant.models.spec import ModelSpec
from kvant.quantize.kv_constants import layer_plan, static_scale
from kvant.quantize.kv_known import known_statistics
from kvant.quantize.kv_policy import resolve_layer_formats
from kvant.quantize.kv_statistics import STATISTICS_FILE, KVStatistics, statistics_file
from kvant.quantize.scales.files import read_scales
from kvant.quantize.scales.kv_scales import CODE_DTYPES, KVScales
from kvant.text.tokenizer import Tokenizer
from kvant.weights.load import LoadedModel

logger = logging.getLogger("kvant")


def plan_kv_cache(config: EngineConfig, model: LoadedModel, tokenizer: Tokenizer) -> KVPlan:
    """The KV plan that an engine of this config runs the model with; it may measure the model, once.

    Raises:
        ConfigError: a setting is wrong, contradicts another, or has no effect.
        CorruptModelError: the files that it names are not whole, or not this model's.
    """
    plan, shape = check_kv_settings(config, model.spec, model.dtype), model.spec.kv_shape
    given = _given(config)
    file = None if given is None else statistics_file(given)
    if given is not None and file is None:
        plan = _with_scales(plan, read_scales(given, shape.num_layers, shape.num_kv_heads), shape.num_kv_heads)
    if not any(_lacks_constants(layer) for layer in plan.layers):
        return plan
    statistics = KVStatistics.load(file, shape) if file else known_statistics(model, tokenizer)
    return _with_statistics(plan, statistics, model)


def check_kv_settings(config: EngineConfig, spec: ModelSpec, compute_dtype: torch.dtype) -> KVPlan:
    """Every layer's format; all that can be wrong with the settings is told, without the weights.

    Raises:
        ConfigError: as `plan_kv_cache` does.
    """
    plan, given = resolve_layer_formats(config, spec, compute_dtype), _given(config)
    if given is None:
        return plan
    if not any(layer.format.measured for layer in plan.layers):
        raise ConfigError(f"quantization_param_path={str(given)!r} is of no use to {plan.name}; leave it out")
    if not os.path.exists(given):  # noqa: PTH110 - Path.exists raises where a directory may not be searched
        raise ConfigError(f"quantization_param_path={str(given)!r} does not exist; check it, or leave it out")
    if statistics_file(given) is None and not any(_static(layer.format.key) for layer in plan.layers):
        raise ConfigError(
            f"quantization_param_path={str(given)!r} is or has no {STATISTICS_FILE}, and {plan.name} does not use "
            "static scales; run `kvant calibrate MODEL --kv -o DIR`, choose int8_pertensor, int8_pertensor_perhead or "
            "fp8_e4m3, or leave it out"
        )
    return plan


def _given(config: EngineConfig) -> Path | None:
    path = config.quantization_param_path
    return None if path is None else Path(path).expanduser()


def _lacks_constants(layer: LayerPlan) -> bool:
    return layer.format.measured and layer.key_stats.scale is None


def _with_statistics(plan: KVPlan, statistics: KVStatistics, model: LoadedModel) -> KVPlan:
    """Each measured layer's constants, but for those that have scales of their own."""
    longest = model.spec.max_position
    layers = [
        layer_plan(layer.format, of_layer, spec.rope, longest) if _lacks_constants(layer) else layer
        for layer, of_layer, spec in zip(plan.layers, statistics.layers, model.spec.layers, strict=True)
    ]
    return replace(plan, layers=tuple(layers))


def _with_scales(plan: KVPlan, scales: KVScales, kv_heads: int) -> KVPlan:
    """The static layers with these scales. They were measured on keys as they are, so these are stored as they are."""
    layers = []
    for layer, key, value in zip(plan.layers, scales.keys, scales.values, strict=True):
        codecs = _static(layer.format.key), _static(layer.format.value)
        stats = [
            LayerStats(scale=static_scale(codec, step.expand(kv_heads) * _reach(scales, codec))) if codec else NO_STATS
            for codec, step in zip(codecs, (key, value), strict=True)
        ]
        plain = replace(layer.format, key=codecs[0] or layer.format.key)
        layers.append(LayerPlan(plain, *stats) if all(codecs) else layer)
    return replace(plan, layers=tuple(layers))


def _reach(scales: KVScales, codec: StaticCodec) -> float:
    """How many steps of the file the largest magnitude is; a file that does not tell is taken to mean the codec's."""
    if scales.codes:
        return StaticCodec(CODE_DTYPES[scales.codes]).largest
    if codec.dtype == torch.int8:
        logger.warning("the file does not tell whether its scales are for int8 or fp8 codes; they are taken for int8")
    return codec.largest


def _static(codec: VectorCodec) -> StaticCodec | None:
    inner = codec.inner if isinstance(codec, ShapedCodec) else codec
    return inner if isinstance(inner, StaticCodec) else None
