"""InternLM 1 and 2."""

from __future__ import annotations

from tests.families.configs.base import INV_FREQ, NO_SCALING, SIZES, Config, Tiny
from tests.families.configs.llama import LLAMA1_CONFIG

_INTERNLM: Config = LLAMA1_CONFIG | {
    "architectures": ["InternLMForCausalLM"],
    "model_type": "internlm",
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
    "bias": True,
    "max_position_embeddings": 20,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
}
_INTERNLM2: Config = SIZES | {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "attn_implementation": "eager",
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "bias": False,
    "hidden_act": "silu",
    "max_position_embeddings": 16,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

# InternLM v1's prompts and what is generated from them stay within its 20 tokens: beyond, the published cache turns the
# keys of old tokens anew.
INTERNLM = (
    Tiny(
        "internlm", _INTERNLM, prompts=(8, 12), bites=({"rotary": {"base": 10000, "type": "origin"}},), stale=INV_FREQ
    ),
    Tiny("internlm-unbiased", _INTERNLM | {"bias": False, "rotary": {"base": 10000, "type": "origin"}}),
    Tiny(
        "internlm-chat",
        _INTERNLM | {"rotary": {"base": 10000, "type": "dynamic", "scaling_factor": 2.0}},
        prompts=(8,),
        bites=({"rotary": {"base": 10000, "type": "dynamic"}},),
    ),
)
INTERNLM2 = (
    Tiny("internlm2", _INTERNLM2 | {"rope_scaling": None}),
    Tiny("internlm2.5", _INTERNLM2, prompts=(8, 13, 40), bites=(NO_SCALING,)),
)
