"""`kvant lite`: LMDeploy's verbs for quantizing, with its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvant.cli.flags import ModelArgument, option
from kvant.cli.progress import reading_progress
from kvant.cli.quantize import BUNDLED, calibration_file, run
from kvant.quantize.recipe import Recipe

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)

Out = Annotated[Path, option("--work-dir", "The directory to make.", "--work_dir", "-o")]
Bits = Annotated[int, option("--w-bits", "4 or 8.", "--w_bits")]
Group = Annotated[int, option("--w-group-size", "Inputs that share a scale.", "--w_group_size")]
Symmetric = Annotated[bool, option("--w-sym", "No zero points.", "--w_sym")]
Calib = Annotated[str, option("--calib-dataset", "A file to calibrate on.", "--calib_dataset", "--calib")]
Samples = Annotated[int, option("--calib-samples", "Pieces of it that are read.", "--calib_samples")]
Seqlen = Annotated[int, option("--calib-seqlen", "Tokens in each of them.", "--calib_seqlen")]


@app.callback()
def lite() -> None:
    """LMDeploy's verbs for quantizing; `kvant quantize` and `kvant calibrate` do the same, and more."""


@app.command("auto_awq")
def auto_awq(
    model: ModelArgument = None,
    *,
    work_dir: Out,
    w_bits: Annotated[int, option("--w-bits", "4: AWQ checkpoints have no other.", "--w_bits")] = 4,
    w_group_size: Group = 128,
    w_sym: Symmetric = False,
    calib_dataset: Calib = BUNDLED,
    calib_samples: Samples = Recipe.samples,
    calib_seqlen: Seqlen = Recipe.seqlen,
) -> None:
    """AWQ, as an AWQ checkpoint."""
    recipe = Recipe(
        method="awq",
        format="awq",
        bits=w_bits,
        group_size=w_group_size,
        symmetric=w_sym or None,
        samples=calib_samples,
        seqlen=calib_seqlen,
    )
    run(model, work_dir, recipe, calib_dataset)


@app.command("auto_gptq")
def auto_gptq(
    model: ModelArgument = None,
    *,
    work_dir: Out,
    w_bits: Bits = 4,
    w_group_size: Group = 128,
    w_sym: Annotated[bool, option("--w-sym/--w-asym", "Without or with zero points.")] = True,
    calib_dataset: Calib = BUNDLED,
    calib_samples: Samples = Recipe.samples,
    calib_seqlen: Seqlen = Recipe.seqlen,
) -> None:
    """GPTQ, as a GPTQ checkpoint."""
    recipe = Recipe(
        method="gptq",
        format="gptq",
        bits=w_bits,
        group_size=w_group_size,
        symmetric=w_sym,
        samples=calib_samples,
        seqlen=calib_seqlen,
    )
    run(model, work_dir, recipe, calib_dataset)


@app.command("smooth_quant")
def smooth_quant(
    model: ModelArgument = None,
    *,
    work_dir: Out,
    calib_dataset: Calib = BUNDLED,
    calib_samples: Samples = Recipe.samples,
    calib_seqlen: Seqlen = Recipe.seqlen,
) -> None:
    """SmoothQuant, W8A8, as a compressed-tensors checkpoint."""
    run(model, work_dir, Recipe(method="smoothquant", samples=calib_samples, seqlen=calib_seqlen), calib_dataset)


@app.command("calibrate")
def calibrate(
    model: ModelArgument = None,
    *,
    work_dir: Out,
    calib_dataset: Calib = BUNDLED,
    calib_samples: Annotated[
        int | None, option("--calib-samples", "Pieces of it that are read. Default: 4.", "--calib_samples")
    ] = None,
    calib_seqlen: Annotated[
        int | None, option("--calib-seqlen", "Tokens in each of them. Default: 512, or less.", "--calib_seqlen")
    ] = None,
) -> None:
    """Measure a model's KV cache, as `kvant calibrate --kv` does. Quantizing weights does its own measuring."""
    calib = calibration_file(calib_dataset)
    with reading_progress() as progress:
        # Imported here: it needs torch.
        from kvant.quantize.kv_calibrate import calibrate_kv
        from kvant.quantize.kv_known import WINDOWS

        samples = WINDOWS if calib_samples is None else calib_samples
        calibrate_kv(model, work_dir, text=calib, samples=samples, seqlen=calib_seqlen, progress=progress)
    typer.echo(
        f"written to {work_dir}; use: kvant serve MODEL --kv-cache-dtype int4 --quantization-param-path {work_dir}"
    )
