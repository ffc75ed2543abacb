"""The miniature model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvant.kernels.reference import ReferenceOps
from kvant.text.tokenizer import Tokenizer
from kvant.weights.load import LoadedModel, load_model, open_source
from kvant.weights.tokenizer import read_tokenizer
from tests.engine.checkpoint import write_checkpoint


@pytest.fixture(autouse=True, scope="package")
def _single_thread() -> Iterator[None]:
    """Enough for miniatures: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature's directory; a token is a byte, and 512 of them are its longest context."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_model(tiny_path: Path) -> LoadedModel:
    """The miniature, computing in float32."""
    return load_model(tiny_path, dtype="float32", ops=ReferenceOps())


@pytest.fixture(scope="session")
def tokenizer(tiny_path: Path) -> Tokenizer:
    """The miniature's, one token a byte."""
    return read_tokenizer(open_source(tiny_path))
