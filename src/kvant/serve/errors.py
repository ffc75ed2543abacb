"""Every failure as OpenAI's envelope: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from kvant.errors import ConfigError, EngineDeadError, KvantError, RequestError
from kvant.serve.schema import Error, ErrorReply

CLIENT_CLOSED_REQUEST = 499
_TYPES = {401: "authentication_error", 404: "not_found_error", 503: "service_unavailable_error"}


class ApiError(HTTPException):
    """A refusal with its HTTP status; `param` names the field at fault, `code` is for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.param = param
        self.code = code


def envelope(error: Exception) -> tuple[int, ErrorReply]:
    """The HTTP status and body for an error; one that kvant did not raise on purpose stays vague."""
    if isinstance(error, HTTPException):
        param, code = getattr(error, "param", None), getattr(error, "code", None)
        return error.status_code, _reply(error.status_code, str(error.detail), param, code)
    if isinstance(error, RequestValidationError):
        return 400, _reply(400, *_describe(error.errors()))
    if isinstance(error, (RequestError, ConfigError)):
        return 400, _reply(400, str(error))
    if isinstance(error, EngineDeadError):
        return 503, _reply(503, str(error))
    return 500, _reply(
        500, str(error) if isinstance(error, KvantError) else "internal error; the server's log has more"
    )


def error_response(error: Exception) -> JSONResponse:
    """`envelope` as a response."""
    status, reply = envelope(error)
    headers = getattr(error, "headers", None)
    return JSONResponse(reply.model_dump(), status_code=status, headers=headers)


def install_error_handlers(app: FastAPI) -> None:
    """Make `app` answer every failure, unknown routes and bad bodies included, with the envelope."""
    for kind in (HTTPException, RequestValidationError, KvantError, Exception):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.detail in ("Not Found", "Method Not Allowed"):
        error = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}")
    return error_response(error)


async def _answer_nobody(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _reply(status: int, message: str, param: str | None = None, code: str | None = None) -> ErrorReply:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return ErrorReply(error=Error(message=message, type=kind, param=param, code=code))


def _describe(errors: Sequence[dict[str, Any]]) -> tuple[str, str | None]:
    """The message for the first field at fault, and that field's name."""
    if errors[0]["type"] == "json_invalid":
        return f"the body is not JSON: {errors[0]['ctx']['error']}", None
    fields = ["" if len(error["loc"]) < 2 else str(error["loc"][1]) for error in errors]
    field = fields[0]
    if not field and errors[0]["type"] == "value_error":
        return _reason(errors[0]), None
    if not field:
        return "the body must be a JSON object, sent with Content-Type: application/json", None
    if errors[0]["type"] == "extra_forbidden" and len(errors[0]["loc"]) == 2:
        return f"{field}: not supported by this server, or not with this value; leave it out", field
    # A field that may be several types fails once for each: say them all.
    reasons = dict.fromkeys(_reason(error) for error, name in zip(errors, fields, strict=True) if name == field)
    return f"{field}: {'; or '.join(list(reasons)[:4])}", field


def _reason(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"][2:])
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
