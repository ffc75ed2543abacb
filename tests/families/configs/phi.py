"""Phi-3 and Phi-4."""

from __future__ import annotations

from tests.families.configs.base import NO_SCALING, SIZES, Config, Tiny

_PHI3: Config = SIZES | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 64,
    "pad_token_id": 0,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 10,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def _longrope(pairs: int, kind: str) -> Config:
    """Divisors of a release's shape: short ones near 1, long ones growing to tens."""
    short = [1.0 + 0.35 * i for i in range(pairs)]
    long = [1.1 * 1.8**i for i in range(pairs)]
    return {"rope_scaling": {"long_factor": long, "short_factor": short, "type": kind}}


_PHI3_LONG: Config = _PHI3 | {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 24,
    "sliding_window": 256,
}

PHI3 = (
    Tiny("phi-3-4k", _PHI3, bites=({"sliding_window": None}, {"sliding_window": 9})),
    Tiny("phi-3-128k-long", _PHI3_LONG | _longrope(8, "longrope"), prompts=(12, 20, 40), bites=(NO_SCALING,)),
    Tiny("phi-3-128k-short", _PHI3_LONG | _longrope(8, "longrope"), length=20, bites=(NO_SCALING,)),
    Tiny(
        "phi-4-mini",
        _PHI3_LONG
        | _longrope(6, "longrope")
        | {"num_key_value_heads": 2, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
        bites=({"partial_rotary_factor": 1.0} | _longrope(8, "longrope"),),
    ),
    Tiny("phi-4", _PHI3 | {"num_key_value_heads": 2, "sliding_window": None, "rope_theta": 250000}),
)
