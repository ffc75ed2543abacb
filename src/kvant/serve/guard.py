"""What is refused before a body is read: a missing key, a body that is too large."""

from __future__ import annotations

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvant.serve.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health"})


class Guard:
    """ASGI middleware: the API key, where one is set, for all paths but OPEN_PATHS; and the limit on bodies."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["path"], Headers(scope=scope)) if scope["type"] == "http" else None
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
        else:
            await self._app(scope, self._counted(receive), send)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        given = headers.get("authorization", "").encode()
        if self._expected is not None and path not in OPEN_PATHS and not hmac.compare_digest(given, self._expected):
            message = "wrong or missing API key; send it as 'Authorization: Bearer KEY'"
            return ApiError(401, message, code="invalid_api_key")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_body_bytes:
            return self._too_large()
        return None

    def _counted(self, receive: Receive) -> Receive:
        """`receive` that refuses a body which grows beyond the limit (sent in chunks, it has no stated length)."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request body is larger than {self._max_body_bytes} bytes", code="body_too_large")
