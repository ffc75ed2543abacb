"""`kvant quantize`: a model's weights in fewer bits, and what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvant.cli.flags import ModelArgument, option
from kvant.cli.progress import layer_progress
from kvant.errors import ConfigError
from kvant.quantize.recipe import FORMAT_NAMES, METHOD_NAMES, Recipe

if TYPE_CHECKING:
    from kvant.quantize.outcome import Outcome

app = typer.Typer(rich_markup_mode=None, add_completion=False)

BUNDLED = "bundled"


@app.command()
def quantize(
    model: ModelArgument = None,
    *,
    out: Annotated[Path, option("--out", "The directory to make.", "-o")],
    method: Annotated[str, option("--method", f"How: {', '.join(METHOD_NAMES)}.")] = Recipe.method,
    bits: Annotated[int | None, option("--bits", "4 or 8. Default: 4, and 8 for smoothquant.")] = None,
    group_size: Annotated[
        int | None,
        option("--group-size", "Inputs that share a scale: a power of two, or -1 for whole rows. Default: 128."),
    ] = None,
    symmetric: Annotated[
        bool | None,
        option(
            "--symmetric/--asymmetric",
            "Without or with zero points; with them, less is lost. Default: what most readers of the format take, "
            "zero points for awq and none for the others.",
        ),
    ] = None,
    format: Annotated[  # noqa: A002 - what users call it
        str, option("--format", f"Of the checkpoint: {', '.join(FORMAT_NAMES)}.")
    ] = Recipe.format,
    calib: Annotated[
        str,
        option("--calib", "A file to calibrate on: text, or .jsonl with texts or chats. Default: bundled speeches."),
    ] = BUNDLED,
    samples: Annotated[
        int, option("--samples", "Pieces of the text that are read, from its beginning.")
    ] = Recipe.samples,
    seqlen: Annotated[int, option("--seqlen", "Tokens in each of them.")] = Recipe.seqlen,
    ignore: Annotated[
        list[str] | None,
        option("--ignore", "Modules that stay as they are, as a pattern: '*.down_proj'. May be given several times."),
    ] = None,
    num_threads: Annotated[int | None, option("--num-threads", "CPU threads. Default: all cores.")] = None,
) -> None:
    """Quantize a model's weights.

    \b
    kvant quantize smollm2 -o OUT                        4 bits, the best method for each layer
    kvant quantize MODEL -o OUT --method awq --format awq --group-size 64
    kvant quantize MODEL -o OUT --method smoothquant     W8A8
    kvant chat ./OUT

    MODEL is read layer by layer, so that it may be larger than memory. What the quantization costs is
    measured on a text of its own and written into OUT. A run that was interrupted goes on where it
    stopped when it is started again.
    """  # noqa: D301
    recipe = Recipe(
        method=method,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        format=format,
        samples=samples,
        seqlen=seqlen,
        ignore=tuple(ignore or ()),
    )
    run(model, out, recipe, calib, num_threads)


def calibration_file(name: str) -> Path | None:
    """The file that a text is read from; None for the one that comes with kvant.

    Raises:
        ConfigError: there is no such file.
    """
    if name == BUNDLED:
        return None
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"calibration text {name!r}: this is no file; kvant downloads no data sets, give a file")
    return path


def run(model: str | None, out: Path, recipe: Recipe, calib: str, num_threads: int | None = None) -> None:
    """Quantize, showing how far it is and what came of it."""
    text = calibration_file(calib)
    with layer_progress() as progress:
        # Imported here: it needs torch.
        from kvant.evaluate.texts import read_text
        from kvant.quantize.quantize import is_begun, quantize_model

        try:
            outcome = quantize_model(
                model, out, recipe, calib=text, unseen=read_text(None), num_threads=num_threads, progress=progress
            )
        except KeyboardInterrupt:
            kept = " What was done is kept: the same command goes on from there." if is_begun(out) else ""
            typer.echo(f"interrupted.{kept}", err=True)
            raise typer.Exit(130) from None
    _print(outcome, out)


def _print(outcome: Outcome, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("", "original", "quantized"):
        shown.add_column(heading, justify="right" if heading else "left")
    for row in outcome.rows():
        shown.add_row(*row)
    console = Console(highlight=False, soft_wrap=True)
    console.print(shown)
    console.print()
    for note in outcome.notes():
        console.print(note, style="dim", markup=False)
    typer.echo(f"written to {out}; use: kvant chat {out}")
