"""InternLM2 and 2.5 (`InternLM2ForCausalLM`): grouped queries with wqkv interleaved by group, dynamic NTK."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.families.oracles.basics import causal_attention, dynamic_base, rms_norm, rotate


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint (`bias` is false in every published one)."""
    hidden, vocab, inner = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = hidden // heads
    names: dict[str, tuple[int, ...]] = {"model.tok_embeddings.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        names |= {
            f"{layer}.attention_norm.weight": (hidden,),
            f"{layer}.attention.wqkv.weight": ((heads + 2 * groups) * head_dim, hidden),
            f"{layer}.attention.wo.weight": (hidden, heads * head_dim),
            f"{layer}.ffn_norm.weight": (hidden,),
            f"{layer}.feed_forward.w1.weight": (inner, hidden),
            f"{layer}.feed_forward.w3.weight": (inner, hidden),
            f"{layer}.feed_forward.w2.weight": (hidden, inner),
        }
    return names | {"model.norm.weight": (hidden,), "output.weight": (vocab, hidden)}


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids: list[int], prompt_length: int) -> Tensor:
    """[T, vocab]; under dynamic NTK a prompt's tokens share its length, a generated token has its own."""
    eps = config["rms_norm_eps"]
    bases = [_base(config, max(prompt_length, position + 1)) for position in range(len(ids))]
    x = weights["model.tok_embeddings.weight"][torch.tensor(ids)]
    for i in range(config["num_hidden_layers"]):
        layer = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"model.layers.{i}.")}
        x = x + _attention(config, layer, rms_norm(x, layer["attention_norm.weight"], eps), bases)
        x = x + _mlp(layer, rms_norm(x, layer["ffn_norm.weight"], eps))
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["output.weight"].T


def _base(config: dict[str, Any], length: int) -> float:
    scaling = config.get("rope_scaling")
    if scaling is None:
        return float(config["rope_theta"])
    assert scaling["type"] == "dynamic"
    dim = config["hidden_size"] // config["num_attention_heads"]
    return dynamic_base(config["rope_theta"], dim, scaling["factor"], config["max_position_embeddings"], length)


def split_wqkv(config: dict[str, Any], wqkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of wqkv [(H + 2 G) D, ...], per KV group its query heads, its key, its value -> rows of q, k and v."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, shared = config["hidden_size"] // heads, heads // groups
    by_group = wqkv.unflatten(0, (groups, shared + 2, head_dim))
    return by_group[:, :shared].flatten(0, 2), by_group[:, shared].flatten(0, 1), by_group[:, shared + 1].flatten(0, 1)


def _attention(config: dict[str, Any], layer: dict[str, Tensor], x: Tensor, bases: list[float]) -> Tensor:
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // heads
    q, k, v = ((x @ w.T).unflatten(1, (-1, dim)) for w in split_wqkv(config, layer["attention.wqkv.weight"]))
    k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (rotate(k, bases, dim), v))
    return causal_attention(rotate(q, bases, dim), k, v) @ layer["attention.wo.weight"].T


def _mlp(layer: dict[str, Tensor], x: Tensor) -> Tensor:
    gate, up = x @ layer["feed_forward.w1.weight"].T, x @ layer["feed_forward.w3.weight"].T
    return (F.silu(gate) * up) @ layer["feed_forward.w2.weight"].T
