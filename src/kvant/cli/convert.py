"""`kvant convert`: a model repacked once, so that it is ready in a moment every time it is used."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvant.cli.flags import ENGINE_FLAGS, ModelArgument, option, takes
from kvant.cli.progress import reading_progress
from kvant.config import EngineConfig

app = typer.Typer(rich_markup_mode=None, add_completion=False)

_FIELDS = ("dtype", "weights", "weights_group_size", "num_threads")
_FLAGS = tuple(flag for flag in ENGINE_FLAGS if flag.field in _FIELDS)


class BackendName(StrEnum):
    """`weights.convert.Backend`, which needs torch, for the command line, which does without."""

    CPU = "cpu"
    CUDA = "cuda"


@app.command()
@takes("engine", _FLAGS, lambda values: EngineConfig(**values))
def convert(
    model: ModelArgument = None,
    *,
    output_dir: Annotated[
        Path, option("--output-dir", "Directory for the converted model; it must not exist yet.", "-o", "--output_dir")
    ],
    backend: Annotated[
        BackendName, option("--backend", "What is to compute with it: cpu (the native kernels) or cuda.")
    ] = BackendName.CPU,
    tp: Annotated[
        int,
        typer.Option("--tp", min=1, envvar="KVANT_TP", help="Tensor-parallel ranks to cut the model for, a file each."),
    ] = 1,
    engine: EngineConfig,
) -> None:
    """Repack a model once, so that it is ready in a moment.

    \b
    kvant convert smollm2 -o smollm2-cpu
    kvant convert smollm2 -o smollm2-int4 --weights int4
    kvant chat ./smollm2-cpu

    The result is used wherever a model is. Its weights are mapped into memory instead of read and packed, so starting
    takes as long as it takes to read the tokenizer, and processes that use the same model share its memory. What
    --weights and --dtype say here is fixed; the result works with the backend that it was made for, and with the
    version of kvant whose layout it has. Keep the model that it was made from.
    """  # noqa: D301
    # Imported here: it needs torch.
    from kvant.quantize.load import convert_configured
    from kvant.weights.load import open_source
    from kvant.weights.locate import DEFAULT_MODEL, locate

    with reading_progress("reading the model", "packing") as progress:
        source, name = open_source(locate(model)), model or DEFAULT_MODEL
        convert_configured(source, engine, output_dir, backend=backend.value, tp=tp, name=name, progress=progress)
    typer.echo(output_dir)
