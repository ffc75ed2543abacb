"""Measuring a model's KV cache on a text of the user's choice, and keeping what was found for kvant and other tools."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvant.config import EngineConfig
from kvant.errors import ConfigError
from kvant.formats.kv import SINKS
from kvant.formats.kv_codecs import StaticCodec
from kvant.models.families import model_spec
from kvant.quantize.kv_constants import static_scale
from kvant.quantize.kv_known import WINDOW_SIZE, WINDOWS
from kvant.quantize.kv_measure import Progress, measure_kv
from kvant.quantize.kv_statistics import STATISTICS_FILE, KVStatistics, LayerStatistics
from kvant.quantize.load import load_configured
from kvant.quantize.scales.files import Layout, write_scales
from kvant.quantize.scales.kv_scales import CODE_DTYPES, Codes, KVScales
from kvant.quantize.scales.ranks import split
from kvant.quantize.scales.tensors import SCALES_FILE, scale_tensors
from kvant.quantize.texts import calibration_text, cut_windows, read_text_file
from kvant.weights.load import open_source
from kvant.weights.locate import locate
from kvant.weights.tokenizer import read_tokenizer


@dataclass(frozen=True, kw_only=True)
class ScaleFiles:
    """Which static scales are written, for tools that know neither centres nor feedback.

    Attributes:
        layouts: see `write_scales`.
        codes: the type of the codes that the scales are for.
        per_head: a scale for each KV head instead of one a layer.
        tp_size: tensor-parallel ranks, over which the layout "vllm" splits scales of heads.
    """

    layouts: tuple[Layout, ...] = ("vllm",)
    codes: Codes = "int8"
    per_head: bool = False
    tp_size: int = 1

    def check(self, num_kv_heads: int) -> None:
        """Raises ConfigError where these files cannot hold the scales of a model of so many KV heads."""
        tensors = [layout for layout in self.layouts if layout != "vllm"]
        if len(tensors) > 1:
            raise ConfigError(
                f"the layouts {' and '.join(tensors)} would both be {SCALES_FILE}; write each to a directory of its own"
            )
        if self.tp_size > 1 and "vllm" not in self.layouts:
            raise ConfigError(f"tp_size={self.tp_size}: only the layout 'vllm' tells ranks apart; leave it out")
        step = torch.ones(num_kv_heads if self.per_head else 1)
        split(step, self.tp_size)
        for layout in tensors:
            scale_tensors(KVScales((step,), (step,)), layout)

    def write(self, directory: Path, statistics: KVStatistics, model_type: str | None) -> None:
        """Write them all, each file whole. Raises ConfigError where one cannot be written."""
        scales = static_scales(statistics, self.codes)
        scales = scales if self.per_head else scales.per_layer()
        for layout in self.layouts:
            write_scales(directory, scales, layout, model_type=model_type, tp_size=self.tp_size)


def calibrate_kv(
    model: str | Path | None,
    directory: Path,
    *,
    engine: EngineConfig | None = None,
    text: Path | None = None,
    samples: int = WINDOWS,
    seqlen: int | None = None,
    scales: ScaleFiles | None = None,
    progress: Progress | None = None,
) -> KVStatistics:
    """Measure a model's KV statistics, and write them to a directory together with static scales for other tools.

    Args:
        model: as `kvant.pipeline` takes it.
        directory: gets kv_statistics.safetensors, to be named with `EngineConfig.quantization_param_path`, and the
            scales. It is made where it is missing; files of the same names are replaced.
        engine: in which dtype, with which weights, on which device and with how many threads the model is run; the rest
            has no effect.
        text: a UTF-8 file; None takes the text that kvant measures models on by itself.
        samples: how many consecutive pieces of the text are read, from its beginning.
        seqlen: tokens in each of them; None is 512, or the model's longest context.
        scales: which static scales are written.
        progress: see `measure_kv`.

    Returns:
        What was measured and written.

    Raises:
        KvantError: an unreadable or too short text, a directory or scales that cannot be written, all of which is told
            before the weights are read; or whatever keeps the model from being run.
    """
    engine, scales = engine or EngineConfig(), scales or ScaleFiles()
    check_writable(directory)
    content = calibration_text() if text is None else read_text_file(text)
    path = locate(model)
    source = open_source(path)
    spec = model_spec(source.config)
    scales.check(spec.num_kv_heads)
    seqlen = min(WINDOW_SIZE, spec.max_position) if seqlen is None else seqlen
    _check_pieces(samples, seqlen, spec.max_position)
    windows = cut_windows(content, read_tokenizer(source), samples, seqlen)
    if engine.num_threads is not None:
        torch.set_num_threads(engine.num_threads)
    loaded = load_configured(source, engine)
    statistics = measure_kv(loaded.decoder, windows, progress)
    scales.write(directory, statistics, _model_type(source.config))
    statistics.save(directory / STATISTICS_FILE)
    return statistics


def static_scales(statistics: KVStatistics, codes: Codes) -> KVScales:
    """The step of each KV head with which codes reach its largest keys, not centred, and its largest values."""
    codec = StaticCodec(CODE_DTYPES[codes], per_head=True)
    keys = tuple(static_scale(codec, layer.key_range) for layer in statistics.layers)
    values = tuple(static_scale(codec, layer.value_range) for layer in statistics.layers)
    return KVScales(keys, values, codes)


def common_key_share(layer: LayerStatistics) -> float:
    """How much of the energy of a layer's keys, E |k|^2, lies in their mean: from 0 to 1."""
    common, varying = float(layer.key_mean.square().sum()), float(layer.key_variance.sum())
    return common / max(common + varying, 1e-30)


def check_writable(directory: Path) -> None:
    """Raises ConfigError where it is clear that no file can be written there."""
    existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{directory}: no files can be written in {existing}; choose another directory")


def _check_pieces(samples: int, seqlen: int, max_position: int) -> None:
    if samples < 1:
        raise ConfigError(f"samples={samples} must be at least 1")
    if not SINKS < seqlen <= max_position:
        raise ConfigError(
            f"seqlen={seqlen} must be from {SINKS + 1}, since a text's first {SINKS} tokens are left out, to "
            f"{max_position} tokens, this model's longest context"
        )


def _model_type(config: Mapping[str, Any]) -> str | None:
    """As transformers calls the text model."""
    model_type: str | None = {**config, **(config.get("text_config") or {})}.get("model_type")
    return model_type
