"""Qwen v1, 2 and 3."""

from __future__ import annotations

from tests.families.configs.base import NO_SCALING, SIZES, Config, Tiny

_QWEN2: Config = SIZES | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "max_window_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}
_YARN: Config = {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"}

QWEN2 = (
    Tiny("qwen2-tied", _QWEN2 | {"tie_word_embeddings": True}),
    Tiny("qwen2-large-biases", _QWEN2, bias_std=8.0),
    Tiny(
        "qwen2-windows",
        _QWEN2 | {"use_sliding_window": True, "max_window_layers": 1},
        bites=({"use_sliding_window": False}, {"max_window_layers": 0}, {"max_window_layers": 2}),
    ),
    Tiny("qwen2-yarn", _QWEN2 | {"rope_scaling": _YARN, "rope_theta": 10000.0}, bites=(NO_SCALING,)),
)

_QWEN3: Config = _QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 24,
    "rope_scaling": None,
    "sliding_window": None,
    "tie_word_embeddings": True,
}

QWEN3 = (
    Tiny("qwen3", _QWEN3),
    Tiny(
        "qwen3-yarn",
        _QWEN3 | {"rope_scaling": _YARN | {"rope_type": "yarn"}, "rope_theta": 10000.0},
        bites=(NO_SCALING,),
    ),
    Tiny("qwen3-bias", _QWEN3 | {"attention_bias": True, "tie_word_embeddings": False}),
)

_QWEN_V1: Config = SIZES | {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "attn_dropout_prob": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    "bf16": False,
    "emb_dropout_prob": 0.0,
    "fp16": False,
    "fp32": False,
    "intermediate_size": 160,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 128,
    "no_bias": True,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 12,
    "tie_word_embeddings": False,
    "tokenizer_class": "QWenTokenizer",
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
}

QWEN_V1 = (
    Tiny(
        "qwen-v1",
        _QWEN_V1,
        prompts=(8, 11, 20, 40),
        bites=({"use_dynamic_ntk": False}, {"use_logn_attn": False}, {"seq_length": 24}),
    ),
    Tiny("qwen-v1-neither", _QWEN_V1 | {"use_dynamic_ntk": False, "use_logn_attn": False}),
    Tiny("qwen-v1-partial-rotary", _QWEN_V1 | {"rotary_pct": 0.5}, bites=({"rotary_pct": 1.0},)),
)
