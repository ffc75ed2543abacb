"""Running the application with uvicorn: bind early, drain on SIGTERM or Ctrl-C."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from kvant.errors import ConfigError

# Clients keep connections for a while and reuse them: the server closing first would race with their next request.
_KEEP_ALIVE_SECONDS = 75


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, refusing connections until the server listens on it; port 0 takes a free one.

    Raises:
        ConfigError: the address is in use or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host"
        ) from error
    return bound


def url(bound: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, bound: socket.socket, drain_seconds: int) -> None:
    """Serve until SIGTERM or SIGINT; then accept no more, and cut off what still runs after `drain_seconds`."""
    config = uvicorn.Config(app, timeout_graceful_shutdown=drain_seconds, timeout_keep_alive=_KEEP_ALIVE_SECONDS)
    with _signals_handled():
        uvicorn.Server(config).run(sockets=[bound])


@contextmanager
def _signals_handled() -> Iterator[None]:
    """uvicorn raises the signal that stopped it once more when it has drained; it has been obeyed by then."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
