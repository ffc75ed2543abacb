"""Llama 1 to 3.2 and Mistral."""

from __future__ import annotations

from tests.families.configs.base import INV_FREQ, NO_SCALING, SIZES, Config, Tiny, without

LLAMA_CONFIG: Config = SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-05,
    "pretraining_tp": 1,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA1_CONFIG: Config = without(
    LLAMA_CONFIG, "num_key_value_heads", "attention_bias", "mlp_bias", "rope_scaling", "rope_theta", "attention_dropout"
)
_LLAMA3_ROPE: Config = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}

LLAMA = (
    Tiny("llama-1", LLAMA1_CONFIG | {"rms_norm_eps": 1e-06, "torch_dtype": "float16"}, stale=INV_FREQ),
    Tiny("llama-2", LLAMA_CONFIG | {"num_key_value_heads": 4, "torch_dtype": "float16"}, bites=({"rope_theta": 1e6},)),
    Tiny(
        "llama-3.1",
        LLAMA_CONFIG
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 500000.0, "rope_scaling": _LLAMA3_ROPE},
        length=48,
        bites=(NO_SCALING,),
    ),
    Tiny(
        "llama-3.2",
        LLAMA_CONFIG
        | {"head_dim": 32, "tie_word_embeddings": True, "rope_theta": 500000.0}
        | {"eos_token_id": [2, 3], "rope_scaling": _LLAMA3_ROPE | {"factor": 32.0}},
        length=48,
        bites=(NO_SCALING,),
    ),
    Tiny(
        "llama-linear",
        LLAMA_CONFIG | {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 16},
        bites=(NO_SCALING,),
    ),
    Tiny(
        "llama-dynamic",
        LLAMA_CONFIG | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
        prompts=(8, 13, 40),
        bites=(NO_SCALING,),
    ),
    Tiny(
        "llama-yarn",
        LLAMA_CONFIG
        | {"rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}}
        | {"max_position_embeddings": 128},
        bites=(NO_SCALING,),
    ),
    Tiny(
        "llama-yarn-tuned",
        LLAMA_CONFIG
        | {
            "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.7}
            | {"mscale_all_dim": 1.3, "original_max_position_embeddings": 32, "truncate": False}
        },
        bites=(NO_SCALING,),
    ),
    Tiny("llama-bias", LLAMA_CONFIG | {"attention_bias": True, "mlp_bias": True}),
)

_MISTRAL: Config = without(LLAMA_CONFIG, "pretraining_tp", "attention_bias", "mlp_bias", "rope_scaling") | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": 12,
}

MISTRAL = (
    Tiny("mistral-0.1", _MISTRAL, bites=({"sliding_window": None}, {"sliding_window": 11})),
    Tiny("mistral-nemo", _MISTRAL | {"sliding_window": None, "head_dim": 24, "rope_theta": 1000000.0}),
)
