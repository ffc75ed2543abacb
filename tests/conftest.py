"""Fixtures that all tests share: the real models, where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from kvant.weights.pull import find_pulled

settings.register_profile("kvant", deadline=None)
settings.load_profile("kvant")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct's GGUF file."""
    path = find_pulled("smollm2")
    if path is None:
        pytest.skip("SmolLM2 is not here: kvant models pull smollm2")
    return path


@pytest.fixture(scope="session")
def qwen_coder() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct's GGUF file, from the directory that KVANT_TEST_MODELS names."""
    path = Path(os.environ.get("KVANT_TEST_MODELS", ".")) / "qwen2.5-coder-0.5b.gguf"
    if not path.is_file():
        pytest.skip("set KVANT_TEST_MODELS to a directory with qwen2.5-coder-0.5b.gguf")
    return path
