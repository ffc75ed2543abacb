"""Gemma 1, 2 and 3."""

from __future__ import annotations

from tests.families.configs.base import NO_SCALING, SIZES, Config, Tiny, without

# Gemma's releases leave tied embeddings to the default.
_GEMMA: Config = SIZES | {
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 24,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 256,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}
_GEMMA2: Config = without(_GEMMA, "rope_scaling") | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attn_logit_softcapping": 2.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 1.5,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 16,
    "sliding_window": 10,
}
_GEMMA3: Config = without(_GEMMA, "hidden_act") | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 16,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "sliding_window": 9,
    "sliding_window_pattern": 6,
}
_GEMMA3_LAYERS = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
# The multimodal releases leave most of the text's config to the defaults: 8 heads of 256, 4 KV heads and so on.
_GEMMA3_VISION: Config = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "boi_token_index": 120,
    "eoi_token_index": 121,
    "eos_token_id": [1, 106],
    "image_token_index": 122,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 4,
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 112,
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 9,
        "vocab_size": 128,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "hidden_size": 16,
        "image_size": 16,
        "intermediate_size": 24,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 4,
        "vision_use_head": False,
    },
}

GEMMA = (
    Tiny("gemma", _GEMMA),
    Tiny(
        "gemma-2",
        _GEMMA2,
        bites=(
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"sliding_window": 64},
            {"sliding_window": 9},
            {"query_pre_attn_scalar": 24},
        ),
    ),
    Tiny(
        "gemma-3-1b",
        _GEMMA3,
        bites=(
            {"sliding_window": 64},
            {"sliding_window_pattern": 2},
            {"rope_local_base_freq": 1e6},
            {"rope_theta": 1e4},
        ),
    ),
    Tiny(
        "gemma-3-270m",
        without(_GEMMA3, "sliding_window_pattern")
        | {"_sliding_window_pattern": 6, "layer_types": _GEMMA3_LAYERS, "use_bidirectional_attention": False}
        | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        bites=(NO_SCALING,),
    ),
    Tiny("gemma-3-4b", _GEMMA3_VISION),
)
