"""From a path to a `Decoder`: source -> names -> codec -> fuse -> prepare, one layer at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvant.cache.memory import available_memory
from kvant.errors import CorruptModelError, MemoryFitError, UnsupportedModelError
from kvant.formats.weight import PackedWeight
from kvant.kernels.ops import Ops
from kvant.models.config_keys import token_ids
from kvant.models.decoder import Decoder
from kvant.models.families import Names, family_of, model_spec
from kvant.models.layers import AttentionWeights, DecoderWeights, LayerWeights, Linear, MlpWeights
from kvant.models.spec import ModelSpec
from kvant.weights.codecs.plain import read_vector
from kvant.weights.matrices import MatrixReader, Rounding
from kvant.weights.source import TensorSource

# What checkpoints carry for a quantized KV cache: constants of queries, keys and values, no weights.
_CACHE_CONSTANTS = (
    *(f".{vector}_{constant}" for vector in ("q", "k", "v") for constant in ("scale", "zero_point")),
    *(f".{vector}_proj.output_scale" for vector in ("q", "k", "v")),
    *(".kv_scale", ".k_proj.k_bias", ".v_proj.v_bias", "attn.prob_output_scale"),
)
_CHECKPOINT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what its checkpoint says about generating with it.

    Attributes:
        rounding: the name of the rounding that its matrices went through, if any.
    """

    decoder: Decoder
    source: TensorSource
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    rounding: str | None

    @property
    def spec(self) -> ModelSpec:
        """The decoder's spec."""
        return self.decoder.spec


def open_source(path: Path) -> TensorSource:
    """The checkpoint at a path: a .gguf file or an HF directory.

    Raises:
        ModelNotFoundError, CorruptModelError, UnsupportedModelError: with the cause.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnsupportedModelError(
                f"{path}: a model is a directory with config.json and safetensors, or a .gguf file"
            )
        from kvant.weights.sources.gguf import GgufSource

        return GgufSource(path)
    from kvant.weights.sources.safetensors import SafetensorsSource

    return SafetensorsSource(path)


def inspect_model(path: Path) -> ModelSpec:
    """The spec of the checkpoint at a path; no weights are read."""
    return model_spec(open_source(path).config)


def load_model(
    checkpoint: Path | TensorSource, *, dtype: str, ops: Ops, weights: str | Rounding = "auto"
) -> LoadedModel:
    """Read a checkpoint into a decoder.

    Args:
        checkpoint: a .gguf file or an HF directory, or one that is open.
        dtype: of activations and dense weights; "auto" as `EngineConfig.dtype` says.
        ops: the backend that the weights are prepared for.
        weights: "auto" and "dense" as `EngineConfig.weights` says, or how every matrix is rounded as it is read.

    Raises:
        KvantError: the checkpoint is not whole, not supported or too large, or its matrices cannot be rounded so.
    """
    source = open_source(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    spec = model_spec(source.config)
    matrices = MatrixReader(source, torch.float32, weights, ops.packed_weights)
    matrices = replace(matrices, dtype=_compute_dtype(dtype, spec, matrices))
    _check_memory(matrices)
    prepared = _Loader(source, spec, matrices, ops).load()
    _check_all_read(source)
    eos = dict.fromkeys(spec.eos_token_ids + token_ids(source.generation, "eos_token_id"))
    rounding = weights.name if isinstance(weights, Rounding) else None
    return LoadedModel(Decoder(spec, prepared, ops), source, matrices.dtype, tuple(eos), rounding)


def _check_memory(matrices: MatrixReader) -> None:
    needed, free = matrices.peak_bytes(), available_memory()
    if needed > free:
        fewer_bits = "weights='int4'" if matrices.packed else "a 16-bit dtype"
        raise MemoryFitError(
            f"{matrices.source.path}: the weights take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; use "
            f"{fewer_bits}, a smaller model, or free some memory"
        )


def _check_all_read(source: TensorSource) -> None:
    """Weights of a layer that the decoder has no place for would be missing from every answer."""
    ignored = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "rope_freqs.weight", *_CACHE_CONSTANTS)
    left = sorted(name for name in source.unread() if ".layers." in name or name.startswith(("blk.", "transformer.h.")))
    left = [name for name in left if not name.endswith(ignored) and "vision" not in name]
    if left:
        raise UnsupportedModelError(
            f"{source.path}: {len(left)} tensors, such as {left[0]!r}, have no place in the config's architecture"
        )


def _compute_dtype(name: str, spec: ModelSpec, in_float32: MatrixReader) -> torch.dtype:
    if name != "auto":
        return _CHECKPOINT_DTYPES[name]
    # PyTorch's float32 products are its fastest on CPUs without 16-bit arithmetic.
    if in_float32.peak_bytes() <= available_memory() / 2:
        return torch.float32
    stored = _CHECKPOINT_DTYPES.get(spec.dtype, torch.bfloat16)
    return torch.bfloat16 if stored == torch.float32 else stored


@dataclass(frozen=True)
class _Loader:
    source: TensorSource
    spec: ModelSpec
    matrices: MatrixReader
    ops: Ops

    @property
    def _names(self) -> Names:
        return self.source.names_of(family_of(self.source.config))

    def load(self) -> DecoderWeights:
        names, spec = self._names, self.spec
        embedding = self.ops.prepare(self.matrices.read(names.embedding, (spec.vocab_size, spec.hidden_size)))
        if spec.tied_embeddings:
            head = Linear(embedding)
        else:
            head = self._linear([self.matrices.read(names.head, (spec.vocab_size, spec.hidden_size))], [])
        layers = tuple(self._layer(index) for index in range(len(spec.layers)))
        return DecoderWeights(embedding, layers, self._norm(names.norm, spec.hidden_size), head)

    def _layer(self, index: int) -> LayerWeights:
        names, spec = self._names, self.spec
        prefix = names.layer.format(index)
        post = spec.post_norms
        return LayerWeights(
            input_norm=self._norm(prefix + names.input_norm, spec.hidden_size),
            attention=self._attention(prefix, names),
            mlp_norm=self._norm(prefix + names.mlp_norm, spec.hidden_size),
            mlp=self._mlp(prefix, names),
            post_attention_norm=self._norm(prefix + names.post_attention_norm, spec.hidden_size) if post else None,
            post_mlp_norm=self._norm(prefix + names.post_mlp_norm, spec.hidden_size) if post else None,
        )

    def _attention(self, prefix: str, names: Names) -> AttentionWeights:
        spec = self.spec
        query, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        sizes = (query, kv, kv) if len(names.qkv) == 3 else (query + 2 * kv,)
        qkv = self._fused([prefix + name for name in names.qkv], sizes, spec.hidden_size, _row_orders(spec, names))
        out = self._fused([prefix + names.out], (spec.hidden_size,), query)
        if not spec.qk_norm:
            return AttentionWeights(qkv, out)
        q_norm = self._norm(prefix + names.q_norm, spec.head_dim)
        return AttentionWeights(qkv, out, q_norm, self._norm(prefix + names.k_norm, spec.head_dim))

    def _mlp(self, prefix: str, names: Names) -> MlpWeights:
        width, hidden = self.spec.intermediate_size, self.spec.hidden_size
        sizes = (width, width) if len(names.gate_up) == 2 else (2 * width,)
        gate_up = self._fused([prefix + name for name in names.gate_up], sizes, hidden)
        return MlpWeights(gate_up, self._fused([prefix + names.down], (hidden,), width))

    def _fused(
        self, names: list[str], sizes: tuple[int, ...], columns: int, orders: Mapping[int, Tensor] | None = None
    ) -> Linear:
        """Projections read, their rows put in our order, and fused into one."""
        weights, biases = [], []
        for part, (name, size) in enumerate(zip(names, sizes, strict=True)):
            weight = self.matrices.read(name, (size, columns))
            bias = read_vector(self.source, f"{name}.bias", size, self.matrices.dtype)
            order = (orders or {}).get(part)
            weights.append(weight if order is None else weight.rows(order))
            biases.append(bias if bias is None or order is None else bias[order])
        return self._linear(weights, biases)

    def _linear(self, weights: list[PackedWeight], biases: list[Tensor | None]) -> Linear:
        present = [bias for bias in biases if bias is not None]
        if present and len(present) < len(biases):
            raise CorruptModelError(
                f"{self.source.path}: some projections have a bias where others of the layer have none"
            )
        return Linear(self.ops.prepare(PackedWeight.concat(weights)), torch.cat(present) if present else None)

    def _norm(self, name: str, size: int) -> Tensor:
        return self.source.checked(f"{name}.weight", (size,), torch.float32) + self.spec.norm_offset


def _row_orders(spec: ModelSpec, names: Names) -> dict[int, Tensor]:
    """For each part of qkv whose rows are not stored in our order, the rows to take, in order."""
    if names.row_order == "grouped":
        return {0: _ungroup(spec)}
    if names.row_order == "interleaved":
        return {0: _deinterleave(spec.num_heads, spec.head_dim), 1: _deinterleave(spec.num_kv_heads, spec.head_dim)}
    return {}


def _ungroup(spec: ModelSpec) -> Tensor:
    """Rows of [q heads of a KV group, its k, its v] per group -> all q, all k, all v."""
    per_group = spec.num_heads // spec.num_kv_heads
    rows = torch.arange(spec.num_kv_heads * (per_group + 2) * spec.head_dim)
    q, k, v = rows.view(spec.num_kv_heads, per_group + 2, spec.head_dim).split([per_group, 1, 1], dim=1)
    return torch.cat([q.flatten(), k.flatten(), v.flatten()])


def _deinterleave(heads: int, head_dim: int) -> Tensor:
    """Rotary pairs stored as neighbours (2i, 2i + 1) -> as halves (i, i + D / 2)."""
    return torch.arange(heads * head_dim).view(heads, head_dim // 2, 2).transpose(1, 2).flatten()


def generation_defaults(source: TensorSource) -> dict[str, Any]:
    """Sampling settings that the checkpoint recommends (generation_config.json), by `SamplingParams` names."""
    given = source.generation
    if given.get("do_sample") is False:
        return {"temperature": 0.0}
    keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {key: given[key] for key in keys if given.get(key) is not None}
