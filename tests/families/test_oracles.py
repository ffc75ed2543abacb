"""The oracles themselves, against transformers where it has the same mathematics in another layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.families.configs import TINIES
from tests.families.configs.base import Config
from tests.families.oracles.internlm2 import split_wqkv
from tests.families.oracles.qwen_v1 import ntk_alpha
from tests.families.reference import TransformersReference
from tests.families.tiny import Checkpoint, build


def _assert_equal_logits(checkpoint: Checkpoint, config: Config, weights: dict[str, Tensor]) -> None:
    other = TransformersReference(config, weights)
    for ids in (checkpoint.ids, checkpoint.ids[:10]):
        torch.testing.assert_close(checkpoint.reference.logits(ids), other.logits(ids), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["internlm2", "internlm2.5"])
def test_internlm2_is_llama_with_fused_groups(tmp_path: Path, name: str) -> None:
    checkpoint = build(TINIES[name], tmp_path)
    config, weights = checkpoint.tiny.config, {}
    renamed = {
        "model.tok_embeddings": "model.embed_tokens",
        "output": "lm_head",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
    }
    for key, weight in checkpoint.reference.weights.items():
        if "wqkv" in key:
            layer = key.split(".attention")[0]
            for part, rows in zip("qkv", split_wqkv(config, weight), strict=True):
                weights[f"{layer}.self_attn.{part}_proj.weight"] = rows
            continue
        for old, new in renamed.items():
            key = key.replace(old, new)
        weights[key] = weight
    _assert_equal_logits(checkpoint, config | {"model_type": "llama"}, weights)


@pytest.mark.parametrize("name", ["internlm", "internlm-unbiased", "internlm-chat"])
def test_internlm_is_llama_with_biases(tmp_path: Path, name: str) -> None:
    checkpoint = build(TINIES[name], tmp_path)
    config = checkpoint.tiny.config
    rotary = config.get("rotary", {"type": "dynamic"})
    scaling = {"type": "dynamic", "factor": rotary.get("scaling_factor", 1.0)} if rotary["type"] == "dynamic" else None
    llama = config | {"model_type": "llama", "attention_bias": config["bias"], "rope_scaling": scaling}
    _assert_equal_logits(checkpoint, llama, checkpoint.reference.weights)


def test_qwen_v1_without_its_context_extensions_is_qwen2(tmp_path: Path) -> None:
    checkpoint = build(TINIES["qwen-v1-neither"], tmp_path)
    config, weights = checkpoint.tiny.config, {}
    renamed = {
        "transformer.wte": "model.embed_tokens",
        "transformer.ln_f": "model.norm",
        "transformer.h": "model.layers",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.w1": "mlp.up_proj",
        "mlp.w2": "mlp.gate_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
    for key, weight in checkpoint.reference.weights.items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        if "c_attn" in key:
            for part, rows in zip("qkv", weight.chunk(3), strict=True):
                weights[key.replace("attn.c_attn", f"self_attn.{part}_proj")] = rows
        else:
            weights[key] = weight
    sizes = {
        "intermediate_size": config["intermediate_size"] // 2,
        "num_key_value_heads": config["num_attention_heads"],
    }
    same = {"model_type": "qwen2", "rms_norm_eps": config["layer_norm_epsilon"]}
    _assert_equal_logits(checkpoint, config | same | sizes, weights)


def test_qwen_v1_stretches_its_base_at_each_doubling() -> None:
    lengths = {1: 1, 1024: 1, 2048: 1, 2049: 3, 4096: 3, 4097: 7, 8192: 7, 8193: 15}
    assert {length: ntk_alpha(length, 2048) for length in lengths} == lengths


def test_qwen_v1_scales_queries_from_the_trained_length_on(tmp_path: Path) -> None:
    """Log-n attention equals a larger scale of all scores, set by the position of the query."""
    checkpoint = build(TINIES["qwen-v1"], tmp_path)
    ids, trained = checkpoint.ids, checkpoint.tiny.config["seq_length"]
    with_log_n = checkpoint.reference.changed(num_hidden_layers=1).logits(ids)
    plain = checkpoint.reference.changed(num_hidden_layers=1, use_logn_attn=False)
    assert torch.equal(with_log_n[:trained], plain.logits(ids)[:trained])
    hidden = checkpoint.tiny.config["hidden_size"]
    for position in (trained, len(ids) - 1):
        factor = torch.log(torch.tensor(position + 1.0)) / torch.log(torch.tensor(float(trained)))
        weights = {name: weight.clone() for name, weight in checkpoint.reference.weights.items()}
        for name in ("weight", "bias"):
            weights[f"transformer.h.0.attn.c_attn.{name}"][:hidden] *= factor
        plain.weights = weights
        torch.testing.assert_close(with_log_n[position], plain.logits(ids)[position], atol=1e-4, rtol=1e-4)
