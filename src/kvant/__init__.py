"""kvant: quantized language models and KV caches in one engine, on plain CPUs and NVIDIA GPUs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvant.version import __version__

if TYPE_CHECKING:
    from kvant.config import EngineConfig, SamplingParams
    from kvant.engine.async_engine import AsyncEngine
    from kvant.engine.outputs import Response
    from kvant.errors import KvantError
    from kvant.pipelines import Pipeline, Session, pipeline

# Imported when first used, so that `import kvant` and `kvant --help` load no torch.
_HOMES = {
    "AsyncEngine": "kvant.engine.async_engine",
    "EngineConfig": "kvant.config",
    "KvantError": "kvant.errors",
    "Pipeline": "kvant.pipelines",
    "Response": "kvant.engine.outputs",
    "SamplingParams": "kvant.config",
    "Session": "kvant.pipelines",
    "pipeline": "kvant.pipelines",
}

__all__ = [
    "AsyncEngine",
    "EngineConfig",
    "KvantError",
    "Pipeline",
    "Response",
    "SamplingParams",
    "Session",
    "__version__",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvant' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
