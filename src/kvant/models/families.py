"""The model families: for each, how its config reads and what its tensors are called. One entry a family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from kvant.errors import CorruptModelError, UnsupportedModelError
from kvant.models import config_keys as keys
from kvant.models.config_keys import Config
from kvant.models.spec import LayerSpec, ModelSpec, RopeSpec

RowOrder = Literal["plain", "grouped", "interleaved"]


@dataclass(frozen=True)
class Names:
    """Tensor names without ".weight" / ".bias". Layer names follow `layer`; several parts are fused in order.

    Attributes:
        row_order: how rows of q, k (and v) are stored. "plain": head by head, rotary halves; "grouped": one fused
            tensor of [q heads of a group, k, v] for each KV group (InternLM2); "interleaved": rows of q and k permuted
            for rotary pairs (2i, 2i + 1) (llama-like GGUF).
    """

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}."
    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    out: str = "self_attn.o_proj"
    post_attention_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    post_mlp_norm: str = "post_feedforward_layernorm"
    row_order: RowOrder = "plain"


HF = Names()
HF_POST_NORMS = replace(HF, mlp_norm="pre_feedforward_layernorm")
GGUF = Names(
    embedding="token_embd",
    norm="output_norm",
    head="output",
    layer="blk.{}.",
    input_norm="attn_norm",
    qkv=("attn_q", "attn_k", "attn_v"),
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    out="attn_output",
    post_attention_norm="post_attention_norm",
    mlp_norm="ffn_norm",
    gate_up=("ffn_gate", "ffn_up"),
    down="ffn_down",
    post_mlp_norm="post_ffw_norm",
)
GGUF_INTERLEAVED = replace(GGUF, row_order="interleaved")


@dataclass(frozen=True)
class Family:
    """One entry: `spec` reads an HF config (a GGUF's metadata is translated to one), the names find the tensors."""

    name: str
    architectures: tuple[str, ...]
    spec: Callable[[Config], ModelSpec]
    names: Names = HF
    gguf_arch: str | None = None
    gguf_names: Names = GGUF


def _common(config: Config, family: str, **different: Any) -> ModelSpec:
    """The spec of a llama-like config; `different` overrides what a family does its own way."""
    heads = int(keys.number(config, "num_attention_heads"))
    hidden = int(keys.number(config, "hidden_size"))
    head_dim = int(keys.number(config, "head_dim", default=hidden // heads))
    params = keys.rope_parameters(config)
    windows = different.pop("windows", (None,) * int(keys.number(config, "num_hidden_layers")))
    if "layers" not in different:
        rope = different.pop("rope", None) or keys.rope(config, head_dim, params)
        different["layers"] = tuple(LayerSpec(rope, window) for window in windows)
    values: dict[str, Any] = {
        "vocab_size": int(keys.number(config, "vocab_size")),
        "hidden_size": hidden,
        "intermediate_size": int(keys.number(config, "intermediate_size")),
        "num_heads": heads,
        "num_kv_heads": int(keys.number(config, "num_key_value_heads", default=heads)),
        "head_dim": head_dim,
        "max_position": keys.max_position(config, params),
        "attention_scale": head_dim**-0.5,
        "rms_eps": float(keys.number(config, "rms_norm_eps", default=1e-6)),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or "float16").removeprefix("torch."),
        "eos_token_ids": keys.token_ids(config, "eos_token_id"),
    }
    values.setdefault("activation", keys.activation(config) if "activation" not in different else "")
    return ModelSpec(family=family, **{**values, **different})


def _windowed(config: Config, sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
    return keys.windows(config, int(keys.number(config, "num_hidden_layers")), sliding)


def _llama(config: Config) -> ModelSpec:
    return _common(config, "llama")


def _mistral(config: Config) -> ModelSpec:
    return _common(config, "mistral", windows=_windowed(config, lambda layer: True))


def _qwen2(config: Config) -> ModelSpec:
    # Released configs name a window but switch it off, so a missing switch means off.
    first = int(keys.number(config, "max_window_layers", default=28))
    switched = {"use_sliding_window": False, **config}
    return _common(config, "qwen2", windows=_windowed(switched, lambda layer: layer >= first))


def _qwen3(config: Config) -> ModelSpec:
    spec = _qwen2({"head_dim": 128, **config})
    return replace(spec, family="qwen3", qk_norm=True)


def _qwen(config: Config) -> ModelSpec:
    """Qwen v1: its own key names, log-n attention and an NTK stretch in powers of two."""
    if config.get("no_bias") is False:
        raise UnsupportedModelError("Qwen v1 with no_bias=false (biases everywhere) is not a published layout")
    trained = int(keys.number(config, "seq_length", default=2048))
    head_dim = int(keys.number(config, "kv_channels", default=128))
    rope = RopeSpec(
        dim=int(head_dim * keys.number(config, "rotary_pct", default=1.0)),
        theta=float(keys.number(config, "rotary_emb_base", default=10000)),
        kind="qwen" if config.get("use_dynamic_ntk") else "default",
        original_length=trained,
    )
    return _common(
        {**config, "head_dim": head_dim, "rms_norm_eps": keys.number(config, "layer_norm_epsilon", default=1e-6)},
        "qwen",
        rope=rope,
        intermediate_size=int(keys.number(config, "intermediate_size")) // 2,
        max_position=max(trained, int(keys.number(config, "max_position_embeddings", default=trained))),
        activation="silu",
        log_n_length=trained if config.get("use_logn_attn") else None,
    )


def _internlm(config: Config) -> ModelSpec:
    # The last published config class fills in this `rotary` where a config has none.
    rotary = {"base": 10000, "type": "dynamic", **(config.get("rotary") or {})}
    kind = "default" if rotary["type"] == "origin" else rotary["type"]
    scaling = {"rope_type": kind, "rope_theta": rotary["base"], "factor": rotary.get("scaling_factor", 1.0)}
    return _common({**config, "rope_parameters": scaling}, "internlm")


def _internlm2(config: Config) -> ModelSpec:
    return _common(config, "internlm2")


def _phi3(config: Config) -> ModelSpec:
    return _common(config, "phi3", windows=_windowed(config, lambda layer: True))


def _gemma(config: Config, family: str = "gemma", **different: Any) -> ModelSpec:
    return _common(
        {"tie_word_embeddings": True, "head_dim": 256, **config},
        family,
        activation=keys.activation({"hidden_act": "gelu_pytorch_tanh", **config}, gelu_means_tanh=True),
        norm_offset=0.0 if config.get("norms_include_offset") else 1.0,
        embedding_scale=math.sqrt(keys.number(config, "hidden_size")),
        **different,
    )


def _gemma2(config: Config) -> ModelSpec:
    return _gemma(
        {"sliding_window": 4096, **config},
        "gemma2",
        post_norms=True,
        windows=_windowed({"sliding_window": 4096, **config}, lambda layer: layer % 2 == 0),
        attention_scale=keys.number(config, "query_pre_attn_scalar", default=256) ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping", 50.0),
        final_softcap=config.get("final_logit_softcapping", 30.0),
    )


# What Gemma 3's published configs leave to the defaults of its config class.
_GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
}


def _gemma3(config: Config) -> ModelSpec:
    config = {**_GEMMA3_DEFAULTS, **config}
    period = int(keys.number(config, "sliding_window_pattern", "_sliding_window_pattern", default=6))
    windows = _windowed(config, lambda layer: (layer + 1) % period != 0)
    head_dim = int(keys.number(config, "head_dim"))
    distant = keys.rope(config, head_dim)
    local_theta = keys.number(config, "rope_local_base_freq", default=10000.0)
    if "sliding_attention" in (config.get("rope_parameters") or {}):
        local_theta = keys.rope_parameters(config, "sliding_attention")["rope_theta"]
    local = RopeSpec(dim=head_dim, theta=float(local_theta))
    return _gemma(
        config,
        "gemma3",
        post_norms=True,
        qk_norm=True,
        layers=tuple(LayerSpec(local if window else distant, window) for window in windows),
        max_position=int(keys.number(config, "max_position_embeddings")),  # the stretch of the rope is in it
        attention_scale=keys.number(config, "query_pre_attn_scalar", default=256) ** -0.5,
        attention_softcap=config.get("attn_logit_softcapping"),
        final_softcap=config.get("final_logit_softcapping"),
    )


_QWEN_NAMES = Names(
    embedding="transformer.wte",
    norm="transformer.ln_f",
    layer="transformer.h.{}.",
    input_norm="ln_1",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    mlp_norm="ln_2",
    gate_up=("mlp.w2", "mlp.w1"),
    down="mlp.c_proj",
)
_INTERNLM2_NAMES = Names(
    embedding="model.tok_embeddings",
    head="output",
    input_norm="attention_norm",
    qkv=("attention.wqkv",),
    out="attention.wo",
    mlp_norm="ffn_norm",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
    row_order="grouped",
)
_PHI3_NAMES = replace(HF, qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))

FAMILIES: tuple[Family, ...] = (
    Family("llama", ("LlamaForCausalLM", "LLaMAForCausalLM"), _llama, HF, "llama", GGUF_INTERLEAVED),
    Family("mistral", ("MistralForCausalLM",), _mistral),
    Family("qwen2", ("Qwen2ForCausalLM",), _qwen2, HF, "qwen2"),
    Family("qwen3", ("Qwen3ForCausalLM",), _qwen3, HF, "qwen3"),
    Family("qwen", ("QWenLMHeadModel",), _qwen, _QWEN_NAMES, "qwen", replace(GGUF, qkv=("attn_qkv",))),
    Family("internlm", ("InternLMForCausalLM",), _internlm),
    Family("internlm2", ("InternLM2ForCausalLM",), _internlm2, _INTERNLM2_NAMES, "internlm2", GGUF_INTERLEAVED),
    Family(
        "phi3", ("Phi3ForCausalLM",), _phi3, _PHI3_NAMES, "phi3", replace(GGUF, qkv=("attn_qkv",), gate_up=("ffn_up",))
    ),
    Family("gemma", ("GemmaForCausalLM",), _gemma, HF, "gemma"),
    Family("gemma2", ("Gemma2ForCausalLM",), _gemma2, HF_POST_NORMS, "gemma2"),
    Family("gemma3", ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), _gemma3, HF_POST_NORMS, "gemma3"),
)


def family_of(config: Config) -> Family:
    """The family whose architecture the config names.

    Raises:
        UnsupportedModelError: none of ours.
        CorruptModelError: the config names no architecture.
    """
    architectures = config.get("architectures") or []
    if not architectures or not isinstance(architectures, list) or not all(type(name) is str for name in architectures):
        raise CorruptModelError("config.json names no architecture; kvant needs its 'architectures' entry")
    for family in FAMILIES:
        if set(architectures) & set(family.architectures):
            return family
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise UnsupportedModelError(f"architecture {architectures[0]} is not supported; kvant runs {known}")


def model_spec(config: Config) -> ModelSpec:
    """The spec of a checkpoint from its config; a multimodal config's text part is taken.

    Raises:
        UnsupportedModelError: the family, or something its config asks for, is not one kvant runs.
        CorruptModelError: the config contradicts itself.
    """
    family = family_of(config)
    try:
        spec = family.spec({**config, **(config.get("text_config") or {})})
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CorruptModelError(f"config.json does not describe a {family.name} model: {error!r}") from error
    _check(spec)
    return spec


def _check(spec: ModelSpec) -> None:
    sizes = (
        spec.vocab_size,
        spec.hidden_size,
        spec.intermediate_size,
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
    )
    if min(sizes) < 1 or not spec.layers:
        raise CorruptModelError(f"config.json: sizes must be positive, got {sizes} and {len(spec.layers)} layers")
    if spec.num_heads % spec.num_kv_heads:
        raise CorruptModelError(f"config.json: {spec.num_heads} heads do not divide into {spec.num_kv_heads} KV heads")
