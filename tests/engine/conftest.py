"""Miniature models for engine tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvant.kernels.reference import ReferenceOps
from kvant.weights.load import LoadedModel, load_model
from tests.engine.checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's directory."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_path: Path) -> LoadedModel:
    """The miniature, computing in float32."""
    return load_model(tiny_path, dtype="float32", ops=ReferenceOps())


@pytest.fixture
def single_thread() -> Iterator[None]:
    """For tests of miniature models: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
