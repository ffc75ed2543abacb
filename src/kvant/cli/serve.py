"""`kvant serve`: one model behind OpenAI's HTTP API."""

from __future__ import annotations

from contextlib import closing
from importlib.util import find_spec
from typing import Annotated

import typer

from kvant.cli.flags import ModelArgument, engine_flags, option
from kvant.cli.loading import nothing_collected
from kvant.config import EngineConfig
from kvant.errors import MissingDependencyError

app = typer.Typer(rich_markup_mode=None, add_completion=False)

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@app.command()
@engine_flags
def serve(
    model: ModelArgument = None,
    *,
    host: Annotated[str, option("--host", "Address to listen on; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, option("--port", "Port to listen on; 0 takes a free one.", "-p")] = 23333,
    served_model_name: Annotated[
        list[str] | None,
        option("--served-model-name", "Name that clients ask for; may be given several times. Default: the model's."),
    ] = None,
    api_key: Annotated[
        str | None,
        option("--api-key", "Key that clients must send. Safer in KVANT_API_KEY, where no process list shows it."),
    ] = None,
    drain_seconds: Annotated[
        int, option("--drain-seconds", "When told to stop: how long answers that have begun may go on.")
    ] = 30,
    engine: EngineConfig,
) -> None:
    """Serve a model to OpenAI clients.

    \b
    kvant serve smollm2                           on http://127.0.0.1:23333/v1
    kvant serve model.gguf --kv-cache-dtype int8  KV cache in 8 bits
    KVANT_API_KEY=... kvant serve smollm2 --host 0.0.0.0
                                                  for others, who need the key

    Routes: /v1/chat/completions, /v1/completions, /v1/models, /health, /version.
    Ctrl-C or SIGTERM ends it: no more requests are taken, those that run may finish.
    """  # noqa: D301
    _require_extra()
    # Imported here: the extra may be missing, and the engine imports torch.
    from kvant.serve import server

    bound = server.bind(host, port)
    typer.echo("loading the model and its engine", err=True)
    with nothing_collected():
        from kvant.engine.async_engine import AsyncEngine
        from kvant.serve.app import create_app

        loaded = AsyncEngine.from_pretrained(model, engine)
    with closing(loaded) as running:
        names = served_model_name or [running.model_name]
        typer.echo(running.memory.describe(), err=True)
        if host not in _LOOPBACK and not api_key:
            typer.echo(
                "warning: others on the network can use this server; set KVANT_API_KEY to ask for a key", err=True
            )
        typer.echo(f"{', '.join(names)} at {server.url(bound)}/v1", err=True)
        server.run(create_app(running, names, api_key or None), bound, drain_seconds)


def _require_extra() -> None:
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise MissingDependencyError("the server needs packages that are not installed: pip install 'kvant[serve]'")
