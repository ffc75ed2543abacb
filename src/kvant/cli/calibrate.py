"""`kvant calibrate`: measure a model's KV cache on a text, for kvant and for other tools."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from kvant.cli.flags import ENGINE_FLAGS, ModelArgument, option, takes
from kvant.cli.progress import reading_progress
from kvant.config import EngineConfig
from kvant.errors import ConfigError

if TYPE_CHECKING:
    from kvant.quantize.kv_calibrate import ScaleFiles
    from kvant.quantize.kv_statistics import KVStatistics

app = typer.Typer(rich_markup_mode=None, add_completion=False)


class CodesName(StrEnum):
    """`quantize.scales.kv_scales.Codes`, which needs torch, for the command line, which does without."""

    INT8 = "int8"
    FP8 = "fp8"


class LayoutName(StrEnum):
    """`quantize.scales.files.Layout`, as `CodesName`."""

    VLLM = "vllm"
    COMPRESSED_TENSORS = "compressed-tensors"
    MODELOPT = "modelopt"
    OUTPUT_SCALE = "output-scale"
    FUSED = "fused"


_WHAT_IT_IS: Mapping[LayoutName, str] = MappingProxyType(
    {
        LayoutName.VLLM: "kv_cache_scales.json for vLLM and its kin (--quantization-param-path); keys and values share "
        "a scale",
        LayoutName.COMPRESSED_TENSORS: "kv_scales.safetensors, to lie beside the weights; what kv_cache_scheme.json "
        "holds belongs into config.json",
        LayoutName.MODELOPT: "kv_scales.safetensors and hf_quant_config.json, to lie beside the weights",
        LayoutName.OUTPUT_SCALE: "kv_scales.safetensors (k_proj.output_scale, v_proj.output_scale)",
        LayoutName.FUSED: "kv_scales.safetensors (kv_scale)",
    }
)

_FIELDS = ("dtype", "weights", "weights_group_size", "num_threads", "device")
_FLAGS = tuple(flag for flag in ENGINE_FLAGS if flag.field in _FIELDS)


@app.command()
@takes("engine", _FLAGS, lambda values: EngineConfig(**values))
def calibrate(
    model: ModelArgument = None,
    *,
    output_dir: Annotated[
        Path, option("--output-dir", "Directory for the files; made where it is missing.", "-o", "--output_dir")
    ],
    kv: Annotated[bool, option("--kv", "Measure the KV cache.")] = False,
    calib: Annotated[
        Path | None, option("--calib", "A UTF-8 text file to read. Default: speeches that come with kvant.")
    ] = None,
    samples: Annotated[
        int | None,
        option("--samples", "How many pieces of the text are read, from its beginning. Default: 4."),
    ] = None,
    seqlen: Annotated[
        int | None, option("--seqlen", "Tokens in each of them. Default: 512, or the model's longest context.")
    ] = None,
    codes: Annotated[
        CodesName, option("--codes", "What other tools' scales are for: vLLM's fp8 cache, or int8.")
    ] = CodesName.INT8,
    layout: Annotated[
        list[LayoutName] | None,
        option("--layout", "How other tools' scales are written; may be given several times. Default: vllm."),
    ] = None,
    per_head: Annotated[
        bool,
        option("--per-head/--per-tensor", "Other tools' scales: one for each KV head, or one a layer, as most want."),
    ] = False,
    tp_size: Annotated[
        int,
        typer.Option(
            "--tp-size",
            "--tp_size",
            min=1,
            envvar="KVANT_TP_SIZE",
            help="Tensor-parallel ranks that the vllm layout is for.",
        ),
    ] = 1,
    engine: EngineConfig,
) -> None:
    """Measure a model's KV cache on a text.

    \b
    kvant calibrate smollm2 --kv -o DIR
    kvant calibrate smollm2 --kv -o DIR --calib my.txt --samples 16
    kvant serve smollm2 --kv-cache-dtype int4 --quantization-param-path DIR

    kvant measures a model by itself when it first needs to, on a text that it brings. Do it by hand for
    a text of your own, which is used where you name DIR, or for other tools: they get static scales.
    """  # noqa: D301
    if not kv:
        raise ConfigError(
            "say what to calibrate: --kv measures the KV cache; weights are calibrated as `kvant quantize` reads them"
        )
    layouts = tuple(dict.fromkeys(layout or [LayoutName.VLLM]))
    with reading_progress() as progress:
        # Imported here: it needs torch.
        from kvant.quantize.kv_calibrate import ScaleFiles, calibrate_kv
        from kvant.quantize.kv_known import WINDOWS

        scales = ScaleFiles(
            layouts=tuple(name.value for name in layouts), codes=codes.value, per_head=per_head, tp_size=tp_size
        )
        measured = calibrate_kv(
            model,
            output_dir,
            engine=engine,
            text=calib,
            samples=WINDOWS if samples is None else samples,
            seqlen=seqlen,
            scales=scales,
            progress=progress,
        )
    _print_files(output_dir, scales, layouts)
    _print_keys(measured)


def _print_files(directory: Path, scales: ScaleFiles, layouts: tuple[LayoutName, ...]) -> None:
    typer.echo(f"written to {directory}:")
    typer.echo("  kv_statistics.safetensors for kvant's own formats")
    for name in layouts:
        typer.echo(f"  {_WHAT_IT_IS[name]}")
    each = "each KV head" if scales.per_head else "each layer"
    typer.echo(f"  the scales are for {scales.codes} codes, one for {each}, and for keys as they are, not centred")
    typer.echo(f"use: kvant serve MODEL --kv-cache-dtype int4 --quantization-param-path {directory}")


def _print_keys(measured: KVStatistics) -> None:
    """What the keys have in common: int8 and int4 take it off, plain codes spend their levels on it."""
    from kvant.quantize.kv_calibrate import common_key_share

    shares = [common_key_share(layer) for layer in measured.layers]
    largest = max(shares)
    typer.echo(
        f"keys: their mean has {median(shares):.1%} of their energy in the median layer, {largest:.1%} in layer "
        f"{shares.index(largest)}"
    )
