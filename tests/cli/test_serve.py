"""`kvant serve` up to the point where the server runs."""

from __future__ import annotations

import socket
import sys
from types import ModuleType, SimpleNamespace

import pytest

from kvant.config import EngineConfig
from kvant.serve import server


@pytest.fixture
def engines(monkeypatch):
    """The engines that the command made, which only pretend; the server ends at once."""
    made = []

    class FakeAsyncEngine:
        memory = SimpleNamespace(describe=lambda: "KV cache int8: 1 MiB")

        @classmethod
        def from_pretrained(cls, model, config):
            engine = cls()
            engine.model_name, engine.config, engine.closed = model or "smollm2", config, False
            made.append(engine)
            return engine

        def close(self):
            self.closed = True

    module = ModuleType("kvant.engine.async_engine")
    module.AsyncEngine = FakeAsyncEngine
    monkeypatch.setitem(sys.modules, "kvant.engine.async_engine", module)
    return made


@pytest.fixture
def runs(monkeypatch):
    """What the server was asked to run: (app, address, seconds to drain)."""
    asked = []

    def run(app, bound, drain_seconds):
        asked.append((app, bound.getsockname()[:2], drain_seconds))
        bound.close()

    monkeypatch.setattr(server, "run", run)
    return asked


def test_flags_reach_the_server_and_the_engine(kvant, engines, runs):
    flags = "--port 0 --served-model-name a --served-model-name org/b --drain-seconds 3 --kv-cache-dtype int8"
    result = kvant("serve", "model.gguf", *flags.split())
    assert result.exit_code == 0, result.output
    (app, (host, port), drain) = runs[0]
    assert app.state.served.names == ("a", "org/b")
    assert (host, drain) == ("127.0.0.1", 3)
    assert engines[0].config == EngineConfig(kv_cache_dtype="int8")
    assert engines[0].closed
    assert "KV cache int8: 1 MiB" in result.stderr
    assert f"a, org/b at http://127.0.0.1:{port}/v1" in result.stderr
    assert "warning" not in result.stderr


def test_an_open_server_without_a_key_is_pointed_out(kvant, engines, runs):
    assert "warning" in kvant("serve", "--port", "0", "--host", "0.0.0.0").stderr
    assert "warning" not in kvant("serve", "--port", "0", "--host", "0.0.0.0", env={"KVANT_API_KEY": "k"}).stderr
    assert runs[0][0].state.served.names == ("smollm2",)


def test_a_port_in_use_is_told_before_the_model_loads(kvant, engines, runs):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = kvant("serve", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot listen on 127.0.0.1:")
    assert engines == []


def test_the_extra_is_named_when_it_is_missing(kvant, monkeypatch):
    monkeypatch.setattr("kvant.cli.serve.find_spec", lambda name: None)
    result = kvant("serve")
    assert result.exit_code == 1
    assert "pip install 'kvant[serve]'" in result.stderr
