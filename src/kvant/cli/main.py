"""The `kvant` command. Each verb's module is imported when the verb is used; none imports torch before it must."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from kvant import __version__
from kvant.errors import KvantError

VERBS = ("chat", "serve", "quantize", "lite", "convert", "eval", "calibrate", "extract-scales", "models", "env")


class _Verbs(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        command = get_command(import_module("kvant.cli." + cmd_name.replace("-", "_")).app)
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KvantError as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error


# Without rich's tables: they cut long flags short where the terminal is narrow.
app = typer.Typer(cls=_Verbs, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvant {__version__}")
        raise typer.Exit


@app.callback()
def kvant(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="KVANT_DEBUG", help="Show the traceback of an error, for bug reports.")
    ] = False,
) -> None:
    """Run large language models in little memory, on a plain CPU.

    \b
    kvant models pull smollm2              fetch a small model (98 MB)
    kvant chat smollm2                     talk to it
    kvant chat smollm2 -q "Why is the sky blue?"
                                           only the answer, on stdout
    kvant serve smollm2 --kv-cache-dtype int8
                                           a server for OpenAI clients
    kvant quantize smollm2 -o OUT          its weights in 4 bits, and what that costs
    kvant eval smollm2                     what a smaller KV cache costs
    kvant convert smollm2 -o DIR           repack it once, to start in a moment
    kvant calibrate smollm2 --kv -o DIR    measure it on a text of your own

    Each flag has a twin in the environment, which its help names: --kv-cache-dtype is KVANT_KV_CACHE_DTYPE.
    """  # noqa: D301


def main() -> None:
    """The console script's entry."""
    app(prog_name="kvant")
