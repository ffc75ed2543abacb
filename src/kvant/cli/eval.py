"""`kvant eval`: what a smaller KV cache costs in quality."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvant import __version__
from kvant.cli.flags import ENGINE_FLAGS, ModelArgument, option, takes
from kvant.cli.progress import reading_progress
from kvant.config import EngineConfig
from kvant.errors import ConfigError

if TYPE_CHECKING:
    from kvant.evaluate.perplexity import Comparison

app = typer.Typer(rich_markup_mode=None, add_completion=False)

TASKS = ("ppl",)
DEFAULT_FORMATS = "int8,int4"
_WIDE = 240
# The engine's settings that change what is measured, or how fast.
_FIELDS = (
    *("dtype", "weights", "weights_group_size"),
    *("kv_cache_dtype_skip_layers", "kv_cache_policy", "quantization_param_path", "num_threads", "device"),
)
_FLAGS = tuple(flag for flag in ENGINE_FLAGS if flag.field in _FIELDS)


@app.command()
@takes("engine", _FLAGS, lambda values: EngineConfig(**values))
def evaluate(
    model: ModelArgument = None,
    *,
    tasks: Annotated[str, option("--tasks", f"What to measure, separated by commas: {', '.join(TASKS)}.")] = "ppl",
    kv_cache_dtype: Annotated[
        str | None,
        option(
            "--kv-cache-dtype",
            "KV-cache formats to compare, separated by commas; `kvant models` lists them. Default: "
            f"{DEFAULT_FORMATS}, or what --kv-cache-policy says.",
        ),
    ] = None,
    text: Annotated[
        Path | None, option("--text", "A UTF-8 text file to read. Default: speeches that come with kvant.")
    ] = None,
    windows: Annotated[int, option("--windows", "How many pieces of the text are read, from its beginning.")] = 8,
    window_size: Annotated[int, option("--window-size", "Tokens in each of them.")] = 1024,
    json_file: Annotated[Path | None, option("--json", "Write the numbers to this file too.")] = None,
    engine: EngineConfig,
) -> None:
    """Measure what a smaller KV cache costs.

    \b
    kvant eval smollm2                              int8 and int4
    kvant eval smollm2 --kv-cache-dtype k8v4,int4   these two
    kvant eval model.gguf --text my.txt --windows 2 --json out.json

    The model reads a text once with each cache. Against a cache of 16 bits, the table tells how much
    worse it foresees the text (perplexity), how far its next-token probabilities move (KL), and how
    often its first choice stays the same (top-1).
    """  # noqa: D301
    _check_tasks(tasks)
    _check_writable(json_file)
    formats = _formats(kv_cache_dtype, engine)
    with reading_progress() as progress:
        # Imported here: it needs torch.
        from kvant.evaluate.perplexity import compare_kv_formats

        comparison = compare_kv_formats(
            model, formats, engine=engine, text=text, windows=windows, window_size=window_size, progress=progress
        )
    _print(comparison)
    if json_file is not None:
        _write(comparison, json_file)


def _check_tasks(tasks: str) -> None:
    names = [name.strip() for name in tasks.split(",")]
    if unknown := [name for name in names if name not in TASKS]:
        raise ConfigError(f"tasks: {', '.join(map(repr, unknown))} is unknown; there is {', '.join(TASKS)}")


def _formats(names: str | None, engine: EngineConfig) -> tuple[str, ...]:
    if names is None:
        names = DEFAULT_FORMATS if engine.kv_cache_policy is None else "auto"
    return tuple(dict.fromkeys(name.strip() for name in names.split(",")))


def _check_writable(path: Path | None) -> None:
    """A file that cannot be written is told before minutes of work, not after them."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"--json {path}: no file can be written there; give a file in a directory that exists")


def _print(comparison: Comparison) -> None:
    from rich.console import Console

    from kvant.evaluate.report import notes, table

    # Whatever the terminal, no number is wrapped or cut; a pipe has no width at all.
    Console(highlight=False, width=_WIDE).print(table(comparison))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    console.print()
    for line in notes(comparison):
        console.print(line, style="dim", markup=False)


def _write(comparison: Comparison, path: Path) -> None:
    import torch

    from kvant.evaluate.report import as_json

    versions = {"kvant": __version__, "torch": torch.__version__, "python": platform.python_version()}
    try:
        path.write_text(json.dumps(as_json(comparison, versions), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: {error.strerror or error}") from error
