"""GGUF files of every architecture against the family's reference with the values that the file's blocks mean."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from tests.families.configs import TINIES
from tests.families.configs.base import Config, Tiny
from tests.families.gguf_files import store, write_gguf
from tests.families.tiny import build
from tests.support import model_logits

TOLERANCE = 1e-4

# What the metadata does not hold is at the value that readers assume.
QUERY_SCALE: Config = {"query_pre_attn_scalar": 24}
FILES: dict[str, tuple[str, Config]] = {
    "llama-2": ("llama", {}),
    "llama-3.1": ("llama", {}),
    "llama-3.2": ("llama", {}),
    "llama-linear": ("llama", {}),
    "llama-bias": ("llama", {}),
    "mistral-nemo": ("llama", {}),
    "qwen2-tied": ("qwen2", {}),
    "qwen2-large-biases": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi-3-4k": ("phi3", {}),
    "phi-3-128k-short": ("phi3", {}),
    "phi-3-128k-long": ("phi3", {}),
    "phi-4-mini": ("phi3", {}),
    "phi-4": ("phi3", {}),
    "gemma": ("gemma", {}),
    "gemma-2": ("gemma2", QUERY_SCALE),
    "gemma-3-1b": ("gemma3", QUERY_SCALE),
    "gemma-3-270m": ("gemma3", QUERY_SCALE | {"rope_local_base_freq": 5000}),
    "internlm2": ("internlm2", {}),
    "qwen-v1-neither": ("qwen", {}),
}
LEGACY = (Kind.Q8_0, Kind.Q4_0, Kind.F16, Kind.Q4_1, Kind.Q5_0, Kind.BF16, Kind.Q5_1)
K_QUANTS = (Kind.Q4_K, Kind.Q6_K, Kind.Q5_K)


def _check(tiny: Tiny, arch: str, kinds: tuple[Kind, ...], directory: Path) -> None:
    """Matrices of these kinds in turn, vectors in float32, as converters do."""
    checkpoint = build(tiny, directory)
    weights, turn = {}, cycle(kinds)
    for name, weight in checkpoint.reference.weights.items():
        if name == "lm_head.weight" and tiny.config.get("tie_word_embeddings", "gemma" in arch):
            continue
        weights[name] = store(weight, next(turn) if weight.dim() == 2 else Kind.F32)
        weight.copy_(weights[name].values)
    path = directory / "model.gguf"
    write_gguf(path, arch, tiny.config, weights)
    expected = checkpoint.reference.logits(checkpoint.ids)
    assert expected.std() > 0.5
    torch.testing.assert_close(model_logits(path, checkpoint.ids), expected, atol=TOLERANCE, rtol=TOLERANCE)


def _resized(tiny: Tiny, **sizes: int) -> Tiny:
    """Rows must be whole blocks."""
    return replace(tiny, config=tiny.config | sizes)


@pytest.mark.parametrize("name", FILES)
def test_architecture(tmp_path: Path, name: str) -> None:
    arch, differences = FILES[name]
    tiny = TINIES[name]
    _check(replace(tiny, config=tiny.config | differences), arch, (Kind.F32,), tmp_path)


@pytest.mark.parametrize(
    "name", ["llama-3.1", "qwen2-large-biases", "phi-4", "gemma-2", "internlm2", "qwen-v1-neither"]
)
def test_blocks_of_32(tmp_path: Path, name: str) -> None:
    arch, differences = FILES[name]
    width = 256 if arch == "qwen" else 128
    tiny = _resized(TINIES[name], intermediate_size=width)
    _check(replace(tiny, config=tiny.config | differences), arch, LEGACY, tmp_path)


@pytest.mark.parametrize("name", ["llama-bias", "phi-4", "gemma-2"])
def test_blocks_of_256(tmp_path: Path, name: str) -> None:
    arch, differences = FILES[name]
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    scale = {"query_pre_attn_scalar": 64} if differences else {}
    _check(_resized(TINIES[name], **sizes, **scale), arch, K_QUANTS, tmp_path)
