"""Qwen v1 (`QWenLMHeadModel`): fused qkv with bias, an MLP of w1 * silu(w2), dynamic NTK and log-n attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.families.oracles.basics import causal_attention, rms_norm, rotate


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint; `intermediate_size` counts w1 and w2 together, `no_bias` spares c_attn's."""
    hidden, vocab, inner = config["hidden_size"], config["vocab_size"], config["intermediate_size"] // 2
    names: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        names |= {
            f"{layer}.ln_1.weight": (hidden,),
            f"{layer}.attn.c_attn.weight": (3 * hidden, hidden),
            f"{layer}.attn.c_attn.bias": (3 * hidden,),
            f"{layer}.attn.c_proj.weight": (hidden, hidden),
            f"{layer}.ln_2.weight": (hidden,),
            f"{layer}.mlp.w1.weight": (inner, hidden),
            f"{layer}.mlp.w2.weight": (inner, hidden),
            f"{layer}.mlp.c_proj.weight": (hidden, inner),
        }
    return names | {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def ntk_alpha(length: int, seq_length: int) -> float:
    """1 up to the trained length, then 3, 7, 15 ... as each doubling of it is passed."""
    return max(2 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1)


def logits(config: dict[str, Any], weights: dict[str, Tensor], ids: list[int], prompt_length: int) -> Tensor:
    """[T, vocab]; the first `prompt_length` tokens set the NTK alpha, which the tokens generated after them keep."""
    eps = config["layer_norm_epsilon"]
    x = weights["transformer.wte.weight"][torch.tensor(ids)]
    for i in range(config["num_hidden_layers"]):
        layer = {name.split(".", 3)[3]: w for name, w in weights.items() if name.startswith(f"transformer.h.{i}.")}
        x = x + _attention(config, layer, rms_norm(x, layer["ln_1.weight"], eps), prompt_length)
        x = x + _mlp(layer, rms_norm(x, layer["ln_2.weight"], eps))
    return rms_norm(x, weights["transformer.ln_f.weight"], eps) @ weights["lm_head.weight"].T


def _attention(config: dict[str, Any], layer: dict[str, Tensor], x: Tensor, prompt_length: int) -> Tensor:
    heads, head_dim, trained = config["num_attention_heads"], config["kv_channels"], config["seq_length"]
    qkv = F.linear(x, layer["attn.c_attn.weight"], layer["attn.c_attn.bias"])
    q, k, v = (part.unflatten(1, (heads, head_dim)) for part in qkv.split(config["hidden_size"], dim=1))
    dim = int(head_dim * config["rotary_pct"])
    alpha = ntk_alpha(prompt_length, trained) if config["use_dynamic_ntk"] else 1
    bases = [config["rotary_emb_base"] * alpha ** (dim / (dim - 2))] * len(x)
    q, k = rotate(q, bases, dim), rotate(k, bases, dim)
    if config["use_logn_attn"]:
        scales = [math.log(n) / math.log(trained) if n > trained else 1.0 for n in range(1, len(x) + 1)]
        q = q * torch.tensor(scales).view(-1, 1, 1)
    return causal_attention(q, k, v) @ layer["attn.c_proj.weight"].T


def _mlp(layer: dict[str, Tensor], x: Tensor) -> Tensor:
    up, gate = x @ layer["mlp.w1.weight"].T, x @ layer["mlp.w2.weight"].T
    return (up * F.silu(gate)) @ layer["mlp.c_proj.weight"].T
