"""The models whose shapes are measured, as their configs publish them, and miniatures for a run on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvant.models.families import model_spec
from kvant.models.spec import ModelSpec

_LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}
_LAYERS = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
}  # of those with 7 and 8 billion
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-2-7b": _LLAMA
    | _LAYERS
    | {"vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    "llama-3-8b": _LLAMA
    | _LAYERS
    | {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    | {"rope_theta": 500000.0},
    "llama-2-13b": _LLAMA
    | {"num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40, "hidden_size": 5120}
    | {"vocab_size": 32000, "intermediate_size": 13824, "max_position_embeddings": 4096},
    "qwen-7b": _LAYERS
    | {"architectures": ["QWenLMHeadModel"], "torch_dtype": "bfloat16", "no_bias": True, "layer_norm_epsilon": 1e-6}
    | {"vocab_size": 151936, "intermediate_size": 22016, "kv_channels": 128, "rotary_emb_base": 10000}
    | {"seq_length": 8192, "max_position_embeddings": 32768, "use_dynamic_ntk": True, "use_logn_attn": True},
    "internlm2.5-7b": _LLAMA
    | _LAYERS
    | {"architectures": ["InternLM2ForCausalLM"], "vocab_size": 92544, "intermediate_size": 14336}
    | {"num_key_value_heads": 8, "max_position_embeddings": 32768, "rope_theta": 1000000.0}
    | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
}
_TINY = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
_TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "kv_channels": 32, "head_dim": 32}


def kv_formats(small: bool) -> tuple[str, str, str]:
    """The KV formats that matter most: 16 bit, 8 and 4. Triton's interpreter cannot multiply bfloat16."""
    return ("fp16" if small else "bf16"), "int8", "int4"


def check_spec() -> ModelSpec:
    """A small model with heads such as large ones have, which a CPU can compute too."""
    sizes = {"vocab_size": 512, "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 2}
    return model_spec(_LLAMA | sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128})


def spec_of(model: str, small: bool) -> ModelSpec:
    """A model's spec; the miniature's of its family where `small`."""
    config = dict(CONFIGS[model])
    if not small:
        return model_spec(config)
    heads = dict(_TINY_HEADS)
    if "num_key_value_heads" not in config:
        del heads["num_key_value_heads"]
    tiny = _TINY | ({"intermediate_size": 256} if model == "qwen-7b" else {})
    return model_spec(config | tiny | heads)


@dataclass(frozen=True)
class LinearShape:
    """One projection of a model: [n, k]."""

    name: str
    n: int
    k: int


def linear_shapes(spec: ModelSpec) -> tuple[LinearShape, ...]:
    """The projections as they are fused, and the head."""
    heads = spec.num_heads * spec.head_dim
    return (
        LinearShape("qkv", heads + 2 * spec.num_kv_heads * spec.head_dim, spec.hidden_size),
        LinearShape("out", spec.hidden_size, heads),
        LinearShape("gate_up", 2 * spec.intermediate_size, spec.hidden_size),
        LinearShape("down", spec.hidden_size, spec.intermediate_size),
        LinearShape("head", spec.vocab_size, spec.hidden_size),
    )
