"""The HTTP application: routes, guard and error handlers around one engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse, Response

from kvant import __version__
from kvant.serve import chat, completions
from kvant.serve.errors import install_error_handlers
from kvant.serve.guard import Guard
from kvant.serve.schema import ModelCard, ModelList
from kvant.serve.served import Served, ServedHere

if TYPE_CHECKING:
    from kvant.engine.async_engine import AsyncEngine

MAX_BODY_BYTES = 32 * 2**20

router = APIRouter()


def create_app(
    engine: AsyncEngine,
    served_names: Sequence[str] = (),
    api_key: str | None = None,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The server's application; `engine` stays the caller's to close.

    Args:
        engine: what answers.
        served_names: the model names clients may ask for; empty takes the engine's own.
        api_key: what clients must send as "Authorization: Bearer KEY", if anything.
        max_body_bytes: larger request bodies are refused with 413.
    """
    app = FastAPI(title="kvant", version=__version__, docs_url=None, redoc_url=None)
    app.state.served = Served(engine, tuple(served_names) or (engine.model_name,))
    app.add_middleware(Guard, api_key=api_key, max_body_bytes=max_body_bytes)
    install_error_handlers(app)
    for routes in (router, chat.router, completions.router):
        app.include_router(routes)
    return app


@router.get("/health")
async def health(served: ServedHere) -> Response:
    """200 while the engine lives, 503 once it is dead."""
    if served.engine.stats().healthy:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "dead"}, status_code=503)


@router.get("/version")
async def version() -> dict[str, str]:
    """kvant's version."""
    return {"version": __version__}


@router.get("/v1/models")
async def list_models(served: ServedHere) -> ModelList:
    """The names this server answers to."""
    return ModelList(data=[served.card(name) for name in served.names])


@router.get("/v1/models/{name:path}")
async def get_model(name: str, served: ServedHere) -> ModelCard:
    """One of them."""
    served.check_model(name)
    return served.card(name)
