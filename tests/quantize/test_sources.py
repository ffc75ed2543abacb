"""Quantizing what was read from a GGUF file: the checkpoint stands alone, for kvant and for transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM

from kvant.errors import ConfigError
from kvant.models.families import model_spec
from kvant.quantize.recipe import Recipe
from kvant.quantize.run import Texts, quantize
from kvant.weights import save
from kvant.weights.hf_config import hf_config
from kvant.weights.load import open_source
from tests.engine.checkpoint import write_checkpoint
from tests.families.configs import ORACLES, TINIES
from tests.families.configs.base import Tiny
from tests.families.gguf_files import store, write_gguf
from tests.families.test_gguf_families import FILES
from tests.families.tiny import build
from tests.support import model_logits

FINE = Recipe(method="rtn", bits=8, group_size=16, samples=2, seqlen=24)


def as_gguf(name: str, directory: Path, missing: tuple[str, ...] = (), **changes: Any) -> tuple[Path, list[int]]:
    """A miniature's file, without tensors whose names end in `missing`, and its text."""
    arch, differences = FILES[name]
    tiny: Tiny = replace(TINIES[name], config=TINIES[name].config | differences | changes)
    checkpoint = build(tiny, directory)
    tied = tiny.config.get("tie_word_embeddings", "gemma" in arch)
    weights = {
        key: store(weight, Kind.F16 if weight.dim() == 2 else Kind.F32)
        for key, weight in checkpoint.reference.weights.items()
        if not (key == "lm_head.weight" and tied) and not key.endswith(missing or ("\0",))
    }
    path = directory / "model.gguf"
    write_gguf(path, arch, tiny.config, weights)
    return path, checkpoint.ids


def without_tokenizer(path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A miniature file quantized; it has no tokenizer."""
    with monkeypatch.context() as patched:
        patched.setattr(save, "_write_tokenizer", lambda source, directory: None)
        return quantized(path, out)


def quantized(path: Path, out: Path, recipe: Recipe = FINE) -> Path:
    ids = torch.randint(3, 100, (4, 24), generator=torch.Generator().manual_seed(3)).tolist()
    windows = tuple(map(tuple, ids))
    outcome = quantize(
        open_source(path), out, recipe, Texts("random tokens", windows[:-2], windows[-2:]), lambda *_: None
    )
    assert outcome.kl < 0.02
    return out


def logits_of_transformers(path: Path, ids: list[int], zeros: tuple[str, ...] = ()) -> torch.Tensor:
    """Of a checkpoint that has all tensors but for those whose names end in `zeros`."""
    model, told = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert all(name.endswith(zeros or ("\0",)) for name in told["missing_keys"])
    assert not told["unexpected_keys"]
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("name", FILES)
def test_a_gguf_becomes_a_checkpoint_that_stands_alone(name: str, tmp_path: Path, monkeypatch) -> None:
    """Its rows in HF's order, its norms as HF stores them, its config complete: transformers computes the same."""
    path, ids = as_gguf(name, tmp_path)
    out = without_tokenizer(path, tmp_path / "out", monkeypatch)
    before, after = (model_spec(open_source(it).config) for it in (path, out))
    assert replace(before, norm_offset=after.norm_offset, dtype=after.dtype) == after
    expected, found = model_logits(path, ids), model_logits(out, ids)
    assert (found - expected).norm() < 0.1 * expected.norm()
    if TINIES[name].config["model_type"] not in ORACLES:
        torch.testing.assert_close(logits_of_transformers(out, ids), found, atol=2e-3, rtol=2e-3)


def test_biases_of_some_projections_only(tmp_path: Path, monkeypatch) -> None:
    """One key of llama's config stands for four projections: what the file has no bias for gets one of zeros."""
    lacking = ("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")
    path, ids = as_gguf("llama-bias", tmp_path, lacking)
    out = without_tokenizer(path, tmp_path / "out", monkeypatch)
    config = json.loads((out / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, False)
    theirs = logits_of_transformers(out, ids, zeros=("o_proj.bias",))
    torch.testing.assert_close(theirs, model_logits(out, ids), atol=2e-3, rtol=2e-3)


def test_ids_of_special_tokens_are_those_of_the_file(tmp_path: Path) -> None:
    """What classes assume where a config names none may lie beyond the vocabulary."""
    source = open_source(as_gguf("phi-3-4k", tmp_path)[0])
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    assert none.items() <= hf_config(source).items()
    bare = source.metadata
    source.metadata = {**bare, "tokenizer.ggml.padding_token_id": 7, "tokenizer.ggml.bos_token_id": 3}
    assert {"bos_token_id": 3, "pad_token_id": 7}.items() <= hf_config(source).items()
    source.metadata = {**bare, "tokenizer.ggml.padding_token_id": TINIES["phi-3-4k"].config["vocab_size"]}
    assert hf_config(source)["pad_token_id"] is None
    for ends, written in (([5], 5), ([5, 6], [5, 6])):
        source.config = {**source.config, "eos_token_id": ends}
        assert hf_config(source)["eos_token_id"] == written


def test_keys_that_older_readers_know(tmp_path: Path) -> None:
    """As the releases' own configs have them, which were written before `rope_parameters` was."""
    phi = hf_config(open_source(as_gguf("phi-4-mini", tmp_path / "phi")[0]))
    published = TINIES["phi-4-mini"].config
    for key in ("original_max_position_embeddings", "partial_rotary_factor", "rope_theta", "sliding_window"):
        assert phi[key] == published[key]
    assert phi["rope_scaling"].keys() == published["rope_scaling"].keys()
    assert phi["rope_scaling"]["long_factor"] == pytest.approx(published["rope_scaling"]["long_factor"])
    gemma = hf_config(open_source(as_gguf("gemma-3-270m", tmp_path / "gemma")[0]))
    published = TINIES["gemma-3-270m"].config | FILES["gemma-3-270m"][1]
    for key in ("rope_theta", "rope_local_base_freq", "rope_scaling", "layer_types", "head_dim"):
        assert gemma[key] == published[key]
    assert (gemma["query_pre_attn_scalar"], gemma["sliding_window_pattern"]) == (24, 6)


def test_what_speaks_of_the_source_is_not_taken_over(tmp_path: Path) -> None:
    """Not the report and the card of a quantization before, no index or note of other weights; all else is."""
    first = quantized(write_checkpoint(tmp_path / "tiny", intermediate_size=64), tmp_path / "first")
    own = ("adapter_config.json", "pytorch_model.bin.index.json", "quantize_config.json", "README.md")
    others = ("generation_config.json", "merges.txt", "tokenizer.model", "configuration_tiny.py", "chat_template.jinja")
    for name in own + others:
        (first / name).write_text(json.dumps({"quant_method": "compressed-tensors", "name": name}))
    second = quantized(first, tmp_path / "second", replace(FINE, group_size=32))
    assert json.loads((second / "quantization_report.json").read_text())["recipe"]["group_size"] == 32
    for name in own[:-1]:
        assert not (second / name).exists()
    assert "quant_method" not in (second / own[-1]).read_text()
    for name in (*others, "tokenizer.json", "tokenizer_config.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert not list(second.glob(".*"))


def test_a_copy_that_was_interrupted_is_made_again(tmp_path: Path, monkeypatch) -> None:
    model, out = write_checkpoint(tmp_path / "tiny", intermediate_size=64), tmp_path / "out"

    def half(source: Path, target: Path) -> Path:
        target.write_bytes(source.read_bytes()[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(save.shutil, "copyfile", half)
        with pytest.raises(ConfigError, match="No space left"):
            quantized(model, out)
    quantized(model, out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
