"""From a path to a `Decoder`: source -> names -> codec -> fuse -> prepare, one layer at a time."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvant.cache.memory import available_memory, device_memory
from kvant.errors import CorruptModelError, MemoryFitError, UnsupportedModelError
from kvant.formats.threads import map_each
from kvant.formats.weight import PackedWeight
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.ops import Ops
from kvant.models.config_keys import token_ids
from kvant.models.decoder import Decoder
from kvant.models.families import Names, family_of, model_spec
from kvant.models.layers import AttentionWeights, DecoderWeights, LayerWeights, Linear, MlpWeights
from kvant.models.spec import ModelSpec
from kvant.weights.codecs.plain import read_vector
from kvant.weights.locate import WORKSPACE_HEADER
from kvant.weights.mapped import check_request, mapped_weights
from kvant.weights.matrices import MatrixReader, Rounding
from kvant.weights.parts import FusedLinear, fused_linears
from kvant.weights.source import TensorSource
from kvant.weights.workspace import WorkspaceSource

# What checkpoints carry for a quantized KV cache: constants of queries, keys and values, no weights.
_CACHE_CONSTANTS = (
    *(f".{vector}_{constant}" for vector in ("q", "k", "v") for constant in ("scale", "zero_point")),
    *(f".{vector}_proj.output_scale" for vector in ("q", "k", "v")),
    *(".kv_scale", ".k_proj.k_bias", ".v_proj.v_bias", "attn.prob_output_scale"),
)
_ELEMENTS_AT_ONCE = 1 << 23  # of layers that are read side by side: for a moment they take their memory twice
CHECKPOINT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, and what its checkpoint says about generating with it.

    Attributes:
        rounding: the name of the rounding that its matrices went through, if any.
        mapped_bytes: of weights that lie in a mapped file, which takes memory only as they are used.
    """

    decoder: Decoder
    source: TensorSource
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    rounding: str | None
    mapped_bytes: int = 0

    @property
    def spec(self) -> ModelSpec:
        """The decoder's spec."""
        return self.decoder.spec


def open_source(path: Path) -> TensorSource:
    """The checkpoint at a path: a .gguf file, an HF directory or a converted model.

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
    if (path / WORKSPACE_HEADER).is_file():
        return WorkspaceSource(path)
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
        checkpoint: a .gguf file, an HF directory or a converted model, or one that is open.
        dtype: of activations and dense weights; "auto" as `EngineConfig.dtype` says.
        ops: the backend that the weights are prepared for.
        weights: "auto" and "dense" as `EngineConfig.weights` says, or how every matrix is rounded as it is read.

    Raises:
        KvantError: the checkpoint is not whole, not supported or too large, or its matrices cannot be rounded so.
    """
    source = open_source(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    spec = model_spec(source.config)
    if isinstance(source, WorkspaceSource):
        return _map(source, spec, dtype, ops, weights)
    matrices = MatrixReader(source, torch.float32, weights, ops.packed_weights)
    matrices = replace(matrices, dtype=compute_dtype(dtype, spec, matrices, ops.device))
    _check_memory(matrices, ops.device)
    prepared = WeightLoader(source, spec, matrices, ops).load()
    check_places(source, source.unread())
    rounding = weights.name if isinstance(weights, Rounding) else None
    decoder = Decoder(spec, prepared, ops, _activations(matrices.dtype, ops))
    return LoadedModel(decoder, source, matrices.dtype, _ends(source, spec), rounding)


def _map(source: WorkspaceSource, spec: ModelSpec, dtype: str, ops: Ops, weights: str | Rounding) -> LoadedModel:
    check_request(source, dtype, weights, ops)
    mapped, size = mapped_weights(source, spec, ops)
    made = source.made
    rounding = None if made.weights in ("auto", "dense") else made.weights
    computed_in = CHECKPOINT_DTYPES[made.dtype]
    decoder = Decoder(spec, mapped, ops, _activations(computed_in, ops))
    return LoadedModel(decoder, source, computed_in, _ends(source, spec), rounding, size)


def _activations(dtype: torch.dtype, ops: Ops) -> torch.dtype | None:
    """The type of activations, which an embedding of codes does not have; native CPU kernels know float32 alone."""
    return None if isinstance(ops, CpuOps) else dtype


def _ends(source: TensorSource, spec: ModelSpec) -> tuple[int, ...]:
    return tuple(dict.fromkeys(spec.eos_token_ids + token_ids(source.generation, "eos_token_id")))


def _check_memory(matrices: MatrixReader, device: torch.device) -> None:
    needed, free = matrices.peak_bytes(), device_memory(device) if device.type == "cuda" else available_memory()
    if needed > free:
        fewer_bits = "weights='int4'" if matrices.packed else "a 16-bit dtype"
        raise MemoryFitError(
            f"{matrices.source.path}: the weights take {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; use "
            f"{fewer_bits}, a smaller model, or free some memory"
        )


def check_places(source: TensorSource, left: Set[str]) -> None:
    """Weights of a layer that the decoder has no place for would be missing from every answer.

    Args:
        source: a checkpoint.
        left: the names of its tensors that have no place, or that nobody read.

    Raises:
        UnsupportedModelError: there are weights of a layer among them.
    """
    ignored = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "rope_freqs.weight", *_CACHE_CONSTANTS)
    names = sorted(name for name in left if ".layers." in name or name.startswith(("blk.", "transformer.h.")))
    names = [name for name in names if not name.endswith(ignored) and "vision" not in name]
    if names:
        raise UnsupportedModelError(
            f"{source.path}: {len(names)} tensors, such as {names[0]!r}, have no place in the config's architecture"
        )


def compute_dtype(name: str, spec: ModelSpec, in_float32: MatrixReader, device: torch.device) -> torch.dtype:
    """The compute type that `EngineConfig.dtype` means on this device, for matrices that such a reader reads."""
    if name != "auto":
        return CHECKPOINT_DTYPES[name]
    # PyTorch's float32 products are its fastest on CPUs without 16-bit arithmetic.
    if device.type == "cpu" and in_float32.peak_bytes() <= available_memory() / 2:
        return torch.float32
    stored = CHECKPOINT_DTYPES.get(spec.dtype, torch.bfloat16)
    return torch.bfloat16 if stored == torch.float32 else stored


@dataclass(frozen=True)
class WeightLoader:
    """Reads a decoder's weights piece by piece, each prepared for the backend.

    Attributes:
        source: the checkpoint.
        spec: its model's.
        matrices: reads one matrix.
        ops: prepares it.
    """

    source: TensorSource
    spec: ModelSpec
    matrices: MatrixReader
    ops: Ops

    @property
    def names(self) -> Names:
        """What the checkpoint calls its tensors."""
        return self.source.names_of(family_of(self.source.config))

    def places(self) -> set[str]:
        """The names of all tensors that a layer of the decoder may have."""
        names, spec = self.names, self.spec
        norms = [names.input_norm, names.mlp_norm]
        norms += [names.q_norm, names.k_norm] if spec.qk_norm else []
        norms += [names.post_attention_norm, names.post_mlp_norm] if spec.post_norms else []
        parts = [part.name for fused in fused_linears(spec, names).values() for part in fused.parts]
        of_a_layer = [f"{name}.weight" for name in (*norms, *parts)] + [f"{name}.bias" for name in parts]
        return {names.layer.format(index) + name for index in range(len(spec.layers)) for name in of_a_layer}

    def load(self) -> DecoderWeights:
        """All of them."""
        embedding = self.embedding()
        head = Linear(embedding) if self.spec.tied_embeddings else self.head()
        layers = map_each(self.layer, range(len(self.spec.layers)), self._layers_at_once())
        return DecoderWeights(embedding, tuple(layers), self.norm(), head)

    def _layers_at_once(self) -> int:
        """Small layers are read side by side; of a large one, each matrix by all cores."""
        fused = fused_linears(self.spec, self.names).values()
        elements = sum(part.rows * linear.columns for linear in fused for part in linear.parts)
        threads = torch.get_num_threads() if self.ops.device.type == "cpu" else 1
        return max(1, min(threads, _ELEMENTS_AT_ONCE // elements))

    def embedding(self) -> Any:
        """The embedding matrix [vocab, hidden]."""
        return self.ops.prepare(self.matrices.read(self.names.embedding, self._vocabulary))

    def head(self) -> Linear:
        """The output head; the embedding once more where it is tied to it."""
        name = self.names.embedding if self.spec.tied_embeddings else self.names.head
        bias = read_vector(self.source, f"{name}.bias", self.spec.vocab_size, self.matrices.dtype)
        return self._linear([self.matrices.read(name, self._vocabulary)], [bias])

    def norm(self) -> Tensor:
        """The last norm [hidden] float32."""
        return self._norm(self.names.norm)

    def layer(self, index: int) -> LayerWeights:
        """One decoder layer."""
        names, spec = self.names, self.spec
        prefix = names.layer.format(index)
        linears = {kind: self._fused(prefix, fused) for kind, fused in fused_linears(spec, names).items()}
        post = spec.post_norms
        return LayerWeights(
            input_norm=self._norm(prefix + names.input_norm),
            attention=self._attention(prefix, linears["qkv"], linears["out"]),
            mlp_norm=self._norm(prefix + names.mlp_norm),
            mlp=MlpWeights(linears["gate_up"], linears["down"]),
            post_attention_norm=self._norm(prefix + names.post_attention_norm) if post else None,
            post_mlp_norm=self._norm(prefix + names.post_mlp_norm) if post else None,
        )

    @property
    def _vocabulary(self) -> tuple[int, int]:
        return self.spec.vocab_size, self.spec.hidden_size

    def _attention(self, prefix: str, qkv: Linear, out: Linear) -> AttentionWeights:
        if not self.spec.qk_norm:
            return AttentionWeights(qkv, out)
        q_norm, k_norm = (
            self._norm(prefix + name, self.spec.head_dim) for name in (self.names.q_norm, self.names.k_norm)
        )
        return AttentionWeights(qkv, out, q_norm, k_norm)

    def _fused(self, prefix: str, fused: FusedLinear) -> Linear:
        """Projections read, their rows put in our order, and fused into one."""
        weights, biases = [], []
        for part in fused.parts:
            name = prefix + part.name
            weight = self.matrices.read(name, (part.rows, fused.columns))
            bias = read_vector(self.source, f"{name}.bias", part.rows, self.matrices.dtype)
            weights.append(weight if part.order is None else weight.rows(part.order))
            biases.append(bias if bias is None or part.order is None else bias[part.order])
        return self._linear(weights, biases)

    def _linear(self, weights: list[PackedWeight], biases: list[Tensor | None]) -> Linear:
        present = [bias for bias in biases if bias is not None]
        # Some quantizers write biases of zeros for projections that have none.
        if not any(bool(bias.any()) for bias in present):
            present = []
        if present and len(present) < len(biases):
            raise CorruptModelError(
                f"{self.source.path}: some projections have a bias where others of the layer have none"
            )
        bias = torch.cat(present).to(self.ops.device) if present else None
        return Linear(self.ops.prepare(PackedWeight.concat(weights)), bias)

    def _norm(self, name: str, size: int | None = None) -> Tensor:
        shape = (self.spec.hidden_size if size is None else size,)
        weight = self.source.checked(f"{name}.weight", shape, torch.float32) + self.spec.norm_offset
        return weight.to(self.ops.device)


def generation_defaults(source: TensorSource) -> dict[str, Any]:
    """Sampling settings that the checkpoint recommends (generation_config.json), by `SamplingParams` names."""
    given = source.generation
    if given.get("do_sample") is False:
        return {"temperature": 0.0}
    keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return {key: given[key] for key in keys if given.get(key) is not None}
