"""The config.json of a checkpoint's text model as HF writes it, whatever the checkpoint was read from."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final

from kvant.models.families import Family, family_of, model_spec
from kvant.models.spec import ModelSpec
from kvant.weights.source import TensorSource

# The keys without which HF's classes make no biases, or, InternLM2's, make some.
_BIASES: Final = MappingProxyType(
    {
        "llama": ("attention_bias", "mlp_bias"),
        "qwen3": ("attention_bias",),
        "gemma": ("attention_bias",),
        "gemma2": ("attention_bias",),
        "gemma3": ("attention_bias",),
        "internlm2": ("bias",),
    }
)


def hf_config(source: TensorSource) -> dict[str, Any]:
    """All of the config, but for what it says of quantization: transformers and kvant read the same model from it."""
    given = dict(source.config)
    family = family_of(given)
    text = given.pop("text_config", None) or {}
    config = {**given, **text, "architectures": [given["architectures"][0]]}
    if text:
        config |= {"architectures": [family.architectures[0]], "model_type": f"{family.name}_text"}
    if source.metadata:
        config |= _completing(config, family, source)
    for key in ("quantization_config", "vision_config", "norms_include_offset"):
        config.pop(key, None)
    return config


def _completing(config: dict[str, Any], family: Family, source: TensorSource) -> dict[str, Any]:
    """What a GGUF's config lacks, or has in other terms."""
    spec = model_spec(config)
    found = {
        "model_type": "gemma3_text" if family.name == "gemma3" else family.name,
        # Classes differ in what they make of missing ones.
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        **_biases(family, source),
        **_tokens(source, spec),
        **_rope(config),
    }
    if "sliding_window" in config:
        found["sliding_window"] = config["sliding_window"] or None
    match family.name:
        case "phi3":
            return found | _phi3(config, found)
        case "gemma3":
            return found | _gemma3(config, found, spec)
        case _:
            return found


def _biases(family: Family, source: TensorSource) -> dict[str, bool]:
    names = source.names_of(family)
    attention, mlp = (*names.qkv, names.out), (*names.gate_up, names.down)
    with_bias = {name.removesuffix(".bias") for name in source.shapes() if name.endswith(".bias")}
    return {
        key: any(module.endswith(mlp if key == "mlp_bias" else attention) for module in with_bias)
        for key in _BIASES.get(family.name, ())
    }


def _tokens(source: TensorSource, spec: ModelSpec) -> dict[str, Any]:
    """Null where the file names none: what classes assume instead may lie beyond the vocabulary."""
    ids = {key: source.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "padding")}
    known = {key: int(i) if i is not None and 0 <= i < spec.vocab_size else None for key, i in ids.items()}
    ends = spec.eos_token_ids
    return {
        "bos_token_id": known["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad_token_id": known["padding"],
    }


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` as of transformers 5, and the keys that were read before."""
    params = {"rope_type": "default", **config["rope_parameters"]}
    if params["rope_type"] == "default":
        params.pop("original_max_position_embeddings", None)
    if params["rope_type"] in ("longrope", "yarn"):
        params.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    found = {"rope_parameters": params, "rope_theta": params["rope_theta"]}
    if params.get("partial_rotary_factor", 1.0) != 1.0:
        found["partial_rotary_factor"] = params["partial_rotary_factor"]
    if params["rope_type"] != "default":
        elsewhere = ("rope_theta", "partial_rotary_factor")
        found["rope_scaling"] = {key: value for key, value in params.items() if key not in elsewhere}
    return found


def _phi3(config: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Its class takes these three keys of a scaling and no others, and the original length from outside of it."""
    trained = config["rope_parameters"].get("original_max_position_embeddings", config["max_position_embeddings"])
    own: dict[str, Any] = {"original_max_position_embeddings": trained}
    if scaling := found.get("rope_scaling"):
        factors = {key: scaling[key] for key in ("short_factor", "long_factor") if key in scaling}
        own["rope_scaling"] = {"type": scaling["rope_type"], **factors}
    return own


def _gemma3(config: dict[str, Any], found: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Its layers are of two types, each with a rotary embedding of its own."""
    local = float(config.get("rope_local_base_freq", 10000.0))
    sliding = {"rope_type": "default", "rope_theta": local}
    return {
        "rope_parameters": {"full_attention": found["rope_parameters"], "sliding_attention": sliding},
        "rope_local_base_freq": local,
        "sliding_window_pattern": 6,
        "layer_types": ["sliding_attention" if layer.window else "full_attention" for layer in spec.layers],
    }
