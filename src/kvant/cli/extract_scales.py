"""`kvant extract-scales`: a quantized checkpoint's KV scales as the file that vLLM and its kin take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvant.cli.flags import option

if TYPE_CHECKING:
    from kvant.quantize.scales.kv_scales import KVScales

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def extract_scales(
    quantized_model: Annotated[
        Path,
        option(
            "--quantized-model",
            "Directory of the quantized model: its config.json and its safetensors files.",
            "--quantized_model",
        ),
    ],
    tp_size: Annotated[
        int,
        typer.Option(
            "--tp-size",
            "--tp_size",
            min=1,
            envvar="KVANT_TP_SIZE",
            help="Tensor-parallel ranks that the file is for; scales for each KV head are split over them.",
        ),
    ] = 1,
    output_dir: Annotated[
        Path | None,
        option("--output-dir", "Where to write the file. Default: the model's directory.", "-o", "--output_dir"),
    ] = None,
    output_name: Annotated[
        str, option("--output-name", "What to call the file.", "--output_name")
    ] = "kv_cache_scales.json",
) -> None:
    """Write a quantized model's KV scales to a JSON file.

    Scales are found in the layouts of compressed-tensors, ModelOpt, Quark and TensorRT-LLM; weights are not read.

    \b
    kvant extract-scales --quantized-model DIR
    kvant extract-scales --quantized-model DIR --tp-size 2 -o OUT
    kvant serve MODEL --kv-cache-dtype fp8_e4m3 --quantization-param-path OUT/kv_cache_scales.json
    """  # noqa: D301
    from kvant.quantize.scales.files import cache_sizes, read_scales
    from kvant.quantize.scales.param_file import write_param_file

    sizes = cache_sizes(quantized_model)
    scales = read_scales(quantized_model, sizes.num_layers, sizes.num_kv_heads)
    path = (output_dir or quantized_model) / output_name
    write_param_file(path, scales, model_type=sizes.model_type, tp_size=tp_size)
    _warn_of_merged(scales)
    typer.echo(path)


def _warn_of_merged(scales: KVScales) -> None:
    differing = sum(not key.equal(value) for key, value in zip(scales.keys, scales.values, strict=True))
    if differing:
        typer.echo(
            f"keys and values have different scales in {differing} of {scales.num_layers} layers; the file holds one "
            "for both, the larger",
            err=True,
        )
