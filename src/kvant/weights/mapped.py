"""A decoder's weights out of a workspace: nothing is read, computed or copied until a step needs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kvant.errors import UnsupportedModelError
from kvant.formats.weight import PackedWeight
from kvant.kernels.cpu.ops import CpuOps
from kvant.kernels.ops import Ops
from kvant.models.families import family_of
from kvant.models.layers import DecoderWeights, LayerWeights, Linear
from kvant.models.spec import ModelSpec
from kvant.weights.matrices import Rounding
from kvant.weights.parts import fused_linears
from kvant.weights.stored import layer_of, linear_of
from kvant.weights.workspace import LAYOUTS, Shard, WorkspaceSource

_HEAD_NORMS = ("q_norm", "k_norm")
_NORMS = ("input_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm")


def check_request(source: WorkspaceSource, dtype: str, weights: str | Rounding, ops: Ops) -> None:
    """That a workspace is what is asked for: it can be nothing else.

    Raises:
        UnsupportedModelError: it was made for another backend, for several ranks, by another version, or with other
            weights or another dtype.
    """
    made, wanted = source.made, weights.name if isinstance(weights, Rounding) else weights
    backend = _backend(ops)
    if backend != made.backend:
        native = "the native kernels" if made.backend == "cpu" else f"a {made.backend} device"
        remedy = "Use the model it was made from" + (", or convert that with --backend cpu" * (made.backend != "cpu"))
        raise UnsupportedModelError(
            f"{source.path} was made for {native} (backend {made.backend!r}), and {backend!r} computes here. {remedy}."
        )
    if made.layout != LAYOUTS[made.backend]:
        raise UnsupportedModelError(
            f"{source.path} has layout {made.layout} of backend {made.backend!r}, and this kvant has "
            f"{LAYOUTS[made.backend]}. Convert the model again."
        )
    if made.tp != 1:
        raise UnsupportedModelError(
            f"{source.path} was made for {made.tp} tensor-parallel ranks, and this engine runs one. Convert the model "
            "again without --tp."
        )
    for name, asked, has in (("weights", wanted, made.weights), ("dtype", dtype, made.dtype)):
        if asked not in ("auto", has):
            raise UnsupportedModelError(
                f"{source.path} was made with {name}={has!r}, which cannot become {asked!r}. Leave {name} out, or "
                "use the model it was made from."
            )


def _backend(ops: Ops) -> str:
    if isinstance(ops, CpuOps):
        return "cpu"
    return "cuda" if ops.device.type == "cuda" or ops.name == "triton" else ops.name


def mapped_weights(source: WorkspaceSource, spec: ModelSpec, ops: Ops) -> tuple[DecoderWeights, int]:
    """The weights of a workspace of one rank, whose backend `ops` is, and how many bytes they are.

    Raises:
        CorruptModelError: the shard is not whole, or not what the config implies.
    """
    shard = source.open_shard()
    pieces = _Pieces(shard, ops)
    vocabulary = (spec.vocab_size, spec.hidden_size)
    embedding = pieces.get("embedding", vocabulary)
    head = Linear(embedding) if spec.tied_embeddings else linear_of("head", pieces.linear("head", vocabulary))
    matrices = {
        name: (sum(part.rows for part in fused.parts), fused.columns)
        for name, fused in fused_linears(spec, source.names_of(family_of(source.config))).items()
    }
    layers = tuple(_layer(pieces, f"layers.{i}.", matrices, spec) for i in range(len(spec.layers)))
    return DecoderWeights(embedding, layers, pieces.get("norm", (spec.hidden_size,)), head), shard.nbytes


def _layer(pieces: _Pieces, prefix: str, matrices: Mapping[str, tuple[int, int]], spec: ModelSpec) -> LayerWeights:
    norms = dict.fromkeys(_NORMS if spec.post_norms else _NORMS[:2], spec.hidden_size)
    if spec.qk_norm:
        norms |= dict.fromkeys(_HEAD_NORMS, spec.head_dim)
    found = {name: pieces.get(prefix + name, (size,)) for name, size in norms.items()}
    for name, shape in matrices.items():
        linear = pieces.linear(prefix + name, shape)
        found |= {key.removeprefix(prefix): piece for key, piece in linear.items()}
    return layer_of(found)


class _Pieces:
    """A shard's pieces as the backend takes them."""

    def __init__(self, shard: Shard, ops: Ops) -> None:
        self._shard, self._ops = shard, ops

    def get(self, name: str, shape: tuple[int, ...]) -> Any:
        piece = self._shard.piece(name, shape)
        if isinstance(piece, PackedWeight):
            return self._ops.prepare(piece)
        return piece.to(self._ops.device) if isinstance(piece, Tensor) else piece

    def linear(self, name: str, shape: tuple[int, int]) -> dict[str, Any]:
        """A matrix and its bias, if it has one."""
        bias = f"{name}.bias"
        return {name: self.get(name, shape), **({bias: self.get(bias, shape[:1])} if bias in self._shard else {})}
