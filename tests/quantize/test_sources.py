"""Quantizing what was read from a GGUF file: the checkpoint stands alone, for kvant and for transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from kvant.quantize.recipe import Recipe
from kvant.quantize.run import Texts, quantize
from kvant.weights import save
from kvant.weights.load import open_source
from tests.families.configs import TINIES
from tests.families.gguf_files import store, write_gguf
from tests.families.tiny import build
from tests.support import model_logits

FINE = Recipe(method="awq", bits=8, group_size=16, samples=8, seqlen=24)
NAMES = {
    "llama-3.1": "llama",
    "qwen2-tied": "qwen2",
    "qwen3": "qwen3",
    "mistral-nemo": "llama",
    "gemma-2": "gemma2",
}
QUERY_SCALE = {"gemma-2": {"query_pre_attn_scalar": 24}}


@pytest.mark.parametrize("name", NAMES)
def test_a_gguf_becomes_a_checkpoint_that_stands_alone(name: str, tmp_path: Path, monkeypatch) -> None:
    """Its rows in HF's order, its norms as HF stores them, its config complete: transformers computes the same."""
    monkeypatch.setattr(save, "_write_tokenizer", lambda source, directory: None)  # the miniature files have none
    tiny = replace(TINIES[name], config=TINIES[name].config | QUERY_SCALE.get(name, {}))
    checkpoint = build(tiny, tmp_path)
    weights = {
        key: store(weight, Kind.F16 if weight.dim() == 2 else Kind.F32)
        for key, weight in checkpoint.reference.weights.items()
        if not (key == "lm_head.weight" and tiny.config.get("tie_word_embeddings", "gemma" in name))
    }
    path = tmp_path / "model.gguf"
    write_gguf(path, NAMES[name], tiny.config, weights)
    ids = torch.randint(3, 100, (10, 24), generator=torch.Generator().manual_seed(3)).tolist()
    windows = tuple(map(tuple, ids))
    outcome = quantize(open_source(path), tmp_path / "out", FINE, Texts(windows[:-2], windows[-2:]), lambda *_: None)
    assert outcome.kl < 0.02
    expected = model_logits(path, checkpoint.ids)
    found = model_logits(tmp_path / "out", checkpoint.ids)
    assert (found - expected).norm() < 0.05 * expected.norm()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(torch.tensor([checkpoint.ids])).logits[0]
    torch.testing.assert_close(theirs, found, atol=0.02, rtol=0.02)
