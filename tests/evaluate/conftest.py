"""The miniature model, and a text to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvant.kernels.reference import ReferenceOps
from kvant.weights.load import LoadedModel, load_model
from tests.engine.checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's directory; a token is a byte, and 512 of them are its longest context."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_path: Path) -> LoadedModel:
    """The miniature, computing in float32, so that "auto" is fp16."""
    return load_model(tiny_path, dtype="float32", ops=ReferenceOps())


@pytest.fixture
def truman() -> Path:
    """A text of 10,467 bytes."""
    return Path(__file__).parents[1] / "data" / "truman_1945.txt"
