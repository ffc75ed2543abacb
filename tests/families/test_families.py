"""Every family against its reference on miniature checkpoints: prompts whole and in chunks, and generation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.families.configs import TINIES
from tests.families.reference import TransformersReference
from tests.families.tiny import Checkpoint, build
from tests.support import model_logits, model_logits_generate

TOLERANCE = 1e-4  # of logits whose deviation is about 1.5
GENERATED = 8


@pytest.fixture(scope="module", params=TINIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return build(TINIES[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> Tensor:
    return checkpoint.reference.logits(checkpoint.ids)


def _assert_close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_prompt(checkpoint: Checkpoint, expected: Tensor) -> None:
    assert expected.std() > 0.5
    for layout in checkpoint.layouts:
        _assert_close(model_logits(layout, checkpoint.ids), expected)


def test_prompt_in_chunks(checkpoint: Checkpoint, expected: Tensor) -> None:
    _assert_close(model_logits(checkpoint.published, checkpoint.ids, chunk=7), expected)


def test_generation(checkpoint: Checkpoint) -> None:
    for length in checkpoint.tiny.prompts or (len(checkpoint.ids),):
        prompt = checkpoint.ids[:length]
        tokens, logits = model_logits_generate(checkpoint.published, prompt, GENERATED)
        assert tokens == logits.argmax(-1).tolist()
        _assert_close(logits, checkpoint.reference.continued(prompt, tokens))


def test_the_text_feels_what_the_config_asks_for(checkpoint: Checkpoint, expected: Tensor) -> None:
    """Windows, caps and scalings that no token met would prove nothing above."""
    for change in checkpoint.tiny.bites:
        changed = checkpoint.reference.changed(**change).logits(checkpoint.ids)
        assert (changed - expected).abs().max() > 500 * TOLERANCE, change


@pytest.mark.parametrize("name", ["llama-bias", "qwen3-bias", "phi-4", "gemma-2", "qwen-v1", "internlm", "internlm2.5"])
def test_the_text_feels_every_tensor(tmp_path: Path, name: str) -> None:
    """With its inputs shifted by one, any tensor changes the logits: none could be left out or swapped unnoticed."""
    checkpoint = build(TINIES[name], tmp_path)
    expected = checkpoint.reference.logits(checkpoint.ids)
    for tensor, weight in checkpoint.reference.weights.items():
        if ".0." in tensor or ".2." in tensor:
            continue  # one layer is enough
        kept = weight.clone()
        weight.copy_(kept.roll(1, dims=-1))
        assert (checkpoint.reference.logits(checkpoint.ids) - expected).abs().max() > 500 * TOLERANCE, tensor
        weight.copy_(kept)


def test_shards(tmp_path: Path) -> None:
    checkpoint = build(TINIES["llama-3.1"], tmp_path)
    assert isinstance(checkpoint.reference, TransformersReference)
    checkpoint.reference.model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    _assert_close(model_logits(tmp_path / "shards", checkpoint.ids), checkpoint.reference.logits(checkpoint.ids))


def test_text_model_nested_in_a_multimodal_one(tmp_path: Path) -> None:
    """transformers 4.52 and later name a multimodal model's parts from `model.` down."""
    checkpoint = build(TINIES["gemma-3-4b"], tmp_path)
    file = checkpoint.published / "model.safetensors"
    renamed = {_nested(name): weight for name, weight in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    _assert_close(model_logits(checkpoint.published, checkpoint.ids), checkpoint.reference.logits(checkpoint.ids))


def _nested(name: str) -> str:
    return "model." + name.replace("language_model.model.", "language_model.")


def test_gemma_means_the_tanh_when_it_says_gelu(tmp_path: Path) -> None:
    """Its first releases name the wrong function."""
    checkpoint = build(TINIES["gemma"], tmp_path)
    for stated in ({"hidden_act": "gelu"}, {"hidden_act": "gelu", "hidden_activation": None}):
        (checkpoint.published / "config.json").write_text(json.dumps(checkpoint.tiny.config | stated))
        _assert_close(model_logits(checkpoint.published, checkpoint.ids), checkpoint.reference.logits(checkpoint.ids))


def test_sixteen_bit_weights_load_as_their_values(tmp_path: Path) -> None:
    checkpoint = build(TINIES["llama-3.2"], tmp_path)
    file = checkpoint.published / "model.safetensors"
    rounded = {name: weight.bfloat16() for name, weight in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})
    config = json.loads((checkpoint.published / "config.json").read_text())
    weights = {name: weight.float() for name, weight in rounded.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    expected = TransformersReference(config, weights).logits(checkpoint.ids)
    _assert_close(model_logits(checkpoint.published, checkpoint.ids), expected)
