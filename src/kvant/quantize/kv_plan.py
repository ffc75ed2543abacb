"""How an engine keeps its KV: each layer's format, and the constants that the formats work with.

Where they come from, in this order: `quantization_param_path`, the cache of what was measured before, or a text that
kvant brings and the model now reads, which takes seconds.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from kvant.config import EngineConfig
from kvant.errors import ConfigError, CorruptModelError
from kvant.formats.kv import KVPlan, LayerPlan
from kvant.formats.kv_codecs import ShapedCodec, StaticCodec, VectorCodec
from kvant.formats.kv_stats import NO_STATS, LayerStats
from kvant.quantize.kv_constants import layer_plan, static_scale
from kvant.quantize.kv_measure import measure_kv
from kvant.quantize.kv_policy import resolve_layer_formats
from kvant.quantize.kv_statistics import STATISTICS_FILE, VERSION, KVStatistics
from kvant.quantize.scales.files import read_scales
from kvant.quantize.scales.kv_scales import Codes, KVScales
from kvant.quantize.texts import cut_windows
from kvant.text.tokenizer import Tokenizer
from kvant.weights.load import LoadedModel
from kvant.weights.pull import cache_dir

WINDOWS, WINDOW_SIZE = 4, 512
_LARGEST: Mapping[Codes, float] = MappingProxyType({"int8": 127.0, "fp8": 448.0})

logger = logging.getLogger("kvant")


def plan_kv_cache(config: EngineConfig, model: LoadedModel, tokenizer: Tokenizer) -> KVPlan:
    """The KV plan that an engine of this config runs the model with; it may measure the model, once.

    Raises:
        ConfigError: a setting is wrong, contradicts another, or has no effect.
        CorruptModelError: the files that it names are not whole, or not this model's.
    """
    plan = resolve_layer_formats(config, model.spec, model.dtype)
    given = None if config.quantization_param_path is None else Path(config.quantization_param_path)
    if given is not None and not any(layer.format.measured for layer in plan.layers):
        raise ConfigError(f"quantization_param_path={str(given)!r} is of no use to {plan.name}; leave it out")
    file = None if given is None else statistics_file(given)
    if given is not None and file is None:
        plan = _with_scales(plan, _read_scales(given, plan, model), model.spec.num_kv_heads)
    if not any(_lacks_constants(layer) for layer in plan.layers):
        return plan
    statistics = KVStatistics.load(file, model.spec.kv_shape) if file else known_statistics(model, tokenizer)
    return _with_statistics(plan, statistics, model)


def statistics_file(path: Path) -> Path | None:
    """The KV statistics that a path names, itself or as a directory that has them; None where it has none."""
    file = path / STATISTICS_FILE if path.is_dir() else path
    return file if file.name == STATISTICS_FILE and file.is_file() else None


def calibration_text() -> str:
    """The bundled text that models are measured on: State of the Union addresses, in the public domain."""
    return resources.files("kvant.quantize").joinpath("data", "calibration.txt").read_text(encoding="utf-8")


def known_statistics(model: LoadedModel, tokenizer: Tokenizer) -> KVStatistics:
    """A model's statistics on the bundled text: from the cache directory, where they are kept once measured."""
    text = calibration_text()
    path = cache_dir() / "kv" / f"{_fingerprint(model, text)}.safetensors"
    if path.exists():
        try:
            return KVStatistics.load(path, model.spec.kv_shape)
        except CorruptModelError as error:
            logger.warning("%s; kvant does so now", error)
    logger.warning("measuring the keys of %s for its KV cache; this is done once", model.source.path)
    windows = cut_windows(text, tokenizer, WINDOWS, min(WINDOW_SIZE, model.spec.max_position))
    statistics = measure_kv(model.decoder, windows)
    try:
        statistics.save(path)
    except ConfigError as error:
        logger.warning("the KV statistics cannot be kept, and will be measured again next time: %s", error)
    return statistics


def _fingerprint(model: LoadedModel, text: str) -> str:
    """Other weights, another text or another way of measuring have another one."""
    files = sorted(model.source.files())
    stamps = [(str(file.resolve()), (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    return hashlib.sha256(repr((VERSION, WINDOWS, WINDOW_SIZE, stamps, text)).encode()).hexdigest()[:32]


def _lacks_constants(layer: LayerPlan) -> bool:
    return layer.format.measured and layer.key_stats.scale is None


def _with_statistics(plan: KVPlan, statistics: KVStatistics, model: LoadedModel) -> KVPlan:
    """Each measured layer's constants, but for those that have scales of their own."""
    layers = [
        layer_plan(layer.format, of_layer, spec.rope) if _lacks_constants(layer) else layer
        for layer, of_layer, spec in zip(plan.layers, statistics.layers, model.spec.layers, strict=True)
    ]
    return replace(plan, layers=tuple(layers))


def _read_scales(path: Path, plan: KVPlan, model: LoadedModel) -> KVScales:
    if not path.exists():
        raise ConfigError(f"quantization_param_path={str(path)!r} does not exist; check it, or leave it out")
    if not any(_static(layer.format.key) for layer in plan.layers):
        raise ConfigError(
            f"quantization_param_path={str(path)!r} is or has no {STATISTICS_FILE}, and {plan.name} does not use "
            "static scales; run `kvant calibrate MODEL --kv`, choose int8_pertensor, int8_pertensor_perhead or "
            "fp8_e4m3, or leave it out"
        )
    shape = model.spec.kv_shape
    return read_scales(path, shape.num_layers, shape.num_kv_heads)


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
    return _LARGEST[scales.codes] if scales.codes else codec.largest


def _static(codec: VectorCodec) -> StaticCodec | None:
    inner = codec.inner if isinstance(codec, ShapedCodec) else codec
    return inner if isinstance(inner, StaticCodec) else None
