"""What the decoder needs to know of a model, as plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from kvant.formats.kv import KVShape

RopeKind = Literal["default", "linear", "dynamic", "qwen", "yarn", "llama3", "longrope"]


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding over the first `dim` elements of a head.

    Attributes:
        dim: rotated elements (even).
        theta: base of the frequencies theta^(-2i / dim).
        kind: how frequencies change beyond the `original_length` the model was trained on.
        factor: stretch of the context for linear, dynamic, yarn and llama3.
        attention_factor: cos and sin are multiplied by it (yarn, longrope).
        beta_fast, beta_slow, truncate: yarn's ramp, in rotations over the original context.
        low_freq_factor, high_freq_factor: llama3's ramp.
        short_factors, long_factors: longrope's divisor for each frequency, within and beyond original_length.
    """

    dim: int
    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_length: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's rotation depends on its prompt's length, not only on its position."""
        return self.kind in ("dynamic", "qwen") or self.short_factors != self.long_factors


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer."""

    rope: RopeSpec | None
    window: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """One generic pre-norm decoder; families differ in these values only.

    Attributes:
        family: name of the entry in families.py.
        layers: one entry a layer: its rotary embedding and its attention window.
        max_position: longest context the model is meant for.
        attention_scale: factor of q k^T.
        attention_softcap, final_softcap: c of c tanh(x / c) on scores and logits.
        norm_offset: added to stored norm weights at load (Gemma keeps w - 1).
        embedding_scale: factor of the embeddings (Gemma: sqrt(hidden_size)).
        tied_embeddings: the output head is the embedding matrix.
        qk_norm: RMS norm of each query and key head before RoPE.
        post_norms: norms after attention and after the MLP, before the residual is added.
        log_n_length: Qwen's log-n attention: from this position on, q is scaled by log(p + 1) / log(log_n_length).
        eos_token_ids: ids that end a text by the model's own config.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    max_position: int
    attention_scale: float
    rms_eps: float = 1e-6
    activation: str = "silu"
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    tied_embeddings: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    attention_softcap: float | None = None
    final_softcap: float | None = None
    log_n_length: int | None = None
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()

    @cached_property
    def length_rope(self) -> RopeSpec | None:
        """The rotary embedding that depends on the prompt's length, if there is one.

        With one, KV of equal prefixes differs between prompts of different lengths beyond `original_length`.
        """
        ropes = (layer.rope for layer in self.layers if layer.rope is not None)
        return next((rope for rope in ropes if rope.depends_on_length), None)

    @property
    def kv_shape(self) -> KVShape:
        """What the model keeps per token in its KV cache."""
        return KVShape(len(self.layers), self.num_kv_heads, self.head_dim)
