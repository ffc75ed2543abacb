"""Fixtures: servers with an engine that only pretends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.serve.harness import Running, fake_server


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Start servers, with `fake_server`'s arguments; they stop with the test."""
    with ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(fake_server(*args, **options))


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Running]:
    """One server for the tests of a file that leave it as it is."""
    with fake_server() as running:
        yield running


@pytest.fixture
def here(shared_server: Running) -> Running:
    """The shared server; what its engine has seen is forgotten."""
    shared_server.engine.seen.clear()
    return shared_server
