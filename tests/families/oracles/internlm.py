"""InternLM v1 (`InternLMForCausalLM`): llama with `bias` on q, k, v and o, and dynamic NTK unless told not to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.families.oracles.basics import causal_attention, dynamic_base, rms_norm, rotate


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint."""
    hidden, vocab, inner = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        names |= {f"{layer}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        if config["bias"]:
            names |= {f"{layer}.self_attn.{p}_proj.bias": (hidden,) for p in "qkvo"}
        names |= {
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    return names | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids: list[int], prompt_length: int) -> Tensor:
    """[T, vocab]. `prompt_length` plays no part: the published cache turns all its keys anew at each length."""
    eps = config["rms_norm_eps"]
    bases = [_base(config, len(ids))] * len(ids)
    x = weights["model.embed_tokens.weight"][torch.tensor(ids)]
    for i in range(config["num_hidden_layers"]):
        layer = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{i}.")}
        x = x + _attention(config, layer, rms_norm(x, layer["input_layernorm.weight"], eps), bases)
        x = x + _mlp(layer, rms_norm(x, layer["post_attention_layernorm.weight"], eps))
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def _base(config: dict[str, Any], length: int) -> float:
    """The default is the published config class's own: releases older than `rotary` are run so too."""
    rotary = config.get("rotary", {"base": 10000, "type": "dynamic"})
    if rotary["type"] == "origin":
        return float(rotary["base"])
    assert rotary["type"] == "dynamic"
    dim = config["hidden_size"] // config["num_attention_heads"]
    factor = rotary.get("scaling_factor", 1.0)
    return dynamic_base(rotary["base"], dim, factor, config["max_position_embeddings"], length)


def _attention(config: dict[str, Any], layer: dict[str, Tensor], x: Tensor, bases: list[float]) -> Tensor:
    heads = config["num_attention_heads"]
    dim = config["hidden_size"] // heads

    def project(name: str, states: Tensor) -> Tensor:
        return F.linear(states, layer[f"self_attn.{name}.weight"], layer.get(f"self_attn.{name}.bias"))

    q, k, v = (project(name, x).unflatten(1, (heads, dim)) for name in ("q_proj", "k_proj", "v_proj"))
    return project("o_proj", causal_attention(rotate(q, bases, dim), rotate(k, bases, dim), v))


def _mlp(layer: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up = x @ layer["mlp.gate_proj.weight"].T, x @ layer["mlp.up_proj.weight"].T
    return (F.silu(gate) * up) @ layer["mlp.down_proj.weight"].T
