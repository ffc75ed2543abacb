"""Fixtures that all tests share: a cache directory of their own, and the real models, where they are."""

from __future__ import annotations

import os

# Triton asks for it when kernels are declared, at import.
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from kvant.kernels.triton.launch import runs_here
from kvant.weights.pull import PULLABLE, find_pulled
from tests.kernels.triton.interpreter import (
    count_with_scalars,
    multiply_bfloat16,
    patch_what_is_known,
    round_to_bfloat16,
)

settings.register_profile("kvant", deadline=None)
settings.load_profile("kvant")


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A KVANT_HOME for the session: it finds the models that were pulled before, and the user's own stays untouched.

    The reference computes.
    """
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    for name in PULLABLE:
        if path := find_pulled(name):
            (home / "models" / f"{name}.gguf").symlink_to(path.resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVANT_HOME", str(home))
        # Tests of what is to be the same bits need it; those of native kernels ask for them.
        patch.setenv("KVANT_CPU_ISA", "reference")
        yield


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if runs_here():
            round_to_bfloat16(patch)
            multiply_bfloat16(patch)
            count_with_scalars(patch)
            patch_what_is_known(patch)
        yield


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
