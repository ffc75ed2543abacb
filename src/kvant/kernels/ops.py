"""The contract every backend fulfils, op by op. `reference.py` is its truth; `tests/test_parity.py` holds others to it.

Shapes use T tokens of the step (all sequences' new tokens, one after the other), S sequences, H query heads, G KV heads
(H a multiple of G), D head_dim. Activations are in the compute dtype unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.formats.weight import PackedWeight
from kvant.kernels.transfer import sent


@dataclass(frozen=True)
class AttentionBatch:
    """Which token belongs to which sequence and where its KV lies. Prefill, chunks and decodes mix freely.

    The tensors are on the device that computes. Kernels there take `starts` and `lengths`; the two tuples, on the
    host, size the launches.

    Attributes:
        positions: [T] int64, each token's position in its sequence.
        slots: [T] int64, where each token's KV is written: block * block_size + offset. The token at position p is
            number p + lead among its sequence's slots, see `KVLayer`.
        query_starts: S + 1 offsets into T; sequence s owns tokens query_starts[s] : query_starts[s + 1].
        context_lens: S lengths, the new tokens included.
        block_tables: [S, max_blocks] int64, each sequence's blocks in order, padded with any valid block.
    """

    positions: Tensor
    slots: Tensor
    query_starts: tuple[int, ...]
    context_lens: tuple[int, ...]
    block_tables: Tensor

    @cached_property
    def starts(self) -> Tensor:
        """query_starts on the device, [S + 1] int32; made at its first use, once a step."""
        return torch.tensor(self.query_starts, dtype=torch.int32).to(self.positions.device, non_blocking=True)

    @cached_property
    def lengths(self) -> Tensor:
        """context_lens on the device, [S] int32; made at its first use, once a step."""
        return torch.tensor(self.context_lens, dtype=torch.int32).to(self.positions.device, non_blocking=True)

    def to(self, device: torch.device, *others: Tensor) -> tuple[AttentionBatch, tuple[Tensor, ...]]:
        """The same on another device, and other tensors of the host in the same copy."""
        own = (self.positions, self.slots, self.block_tables, self.starts, self.lengths)
        positions, slots, tables, starts, lengths, *moved = sent([*own, *others], device)
        batch = AttentionBatch(positions, slots, self.query_starts, self.context_lens, tables)
        batch.__dict__.update(starts=starts, lengths=lengths)
        return batch, tuple(moved)

    @property
    def reported_not_finite(self) -> Tensor | None:
        """`not_finite`, where a backend has asked for it."""
        return self.__dict__.get("not_finite")

    @cached_property
    def not_finite(self) -> Tensor:
        """[T] int32, zeros: a backend that cannot stop at a key or value that is not finite sets its token's to 1."""
        return torch.zeros(len(self.positions), dtype=torch.int32, device=self.positions.device)


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention: score = softcap(q k^T * scale), over the last `window` tokens where one is set.

    A token at position p attends to positions in (p - window, p]. softcap(x) = c tanh(x / c).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class SamplingBatch:
    """Per row of logits: the numbers that shape its distribution, all [R], on the host.

    There a backend sees what the rows need without waiting for the device.

    Attributes:
        temperature: float32; 0 takes the likeliest token.
        top_k: int64; 0 keeps all.
        top_p, min_p: float32; 1 and 0 keep all.
        uniform: float64 in [0, 1), the randomness of each row, drawn by the caller; of a burst, of step after step.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    @property
    def greedy(self) -> bool:
        """Whether every row takes its likeliest token."""
        return not self.temperature.any()

    @property
    def filters(self) -> bool:
        """Whether a row keeps only its likeliest tokens."""
        return bool((self.top_k > 0).any() or (self.top_p < 1).any() or (self.min_p > 0).any())

    def rows(self, index: Tensor) -> SamplingBatch:
        """The numbers of some rows."""
        return SamplingBatch(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device) -> SamplingBatch:
        """The same on another device."""
        return SamplingBatch(*sent([getattr(self, field.name) for field in fields(self)], device))


class Ops(Protocol):
    """What a backend computes. No op keeps a reference to its inputs; only `rope_write_kv` changes one (the cache).

    Attributes:
        device: where tensors are; a batch, activations and the cache must be there.
        capturable: whether its steps can be recorded as CUDA graphs: nothing waits for the device or looks at it.
        packed_weights: whether `linear` computes on quantized weights as they are; if not, they gain nothing here, and
            loading expands them to the compute dtype.
    """

    name: str
    device: torch.device
    capturable: bool
    packed_weights: bool

    def prepare(self, weight: PackedWeight) -> Any:
        """A weight of any format in the backend's own layout, for `linear` and `embedding`. Called once a weight."""

    def linear(self, x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
        """x [T, K] -> x W^T + b, [T, N]. A row's result does not depend on the other rows (see `reference`).

        x may be what `add_rms_norm` made for this weight, too.

        Where the weight says so (`PackedWeight.inputs`), x is rounded to 8 bits first; a backend that rounds it anyway,
        and no more coarsely, does that instead.
        """

    def embedding(self, ids: Tensor, weight: Any) -> Tensor:
        """ids [T] int64 -> rows of the weight, [T, N], in its dtype; float32 where it is quantized."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32; weight [last] float32."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, reader: Any = None
    ) -> tuple[Any, Tensor]:
        """The new residual r = x + residual, and rms_norm(r): returns (normed, r).

        Where `reader` is given, a prepared weight, `normed` is for `linear` with that weight alone: a backend may give
        it in the form that the weight takes, as codes.
        """

    def rope_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVLayer,
        batch: AttentionBatch,
    ) -> Tensor:
        """Rotate q and k, write k and v to the cache's slots in its format, return the rotated q.

        q [T, H, D], k and v [T, G, D]; rotary = (cos, sin), each [T, R / 2] float32, rotates the first R elements of a
        head in pairs (i, i + R / 2); None rotates nothing.
        """

    def attention(self, q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Tensor:
        """Causal attention of q [T, H, D] over the cache, as `AttentionShape` says: [T, H, D]."""

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """x [T, 2 I] = (gate, up) -> act(gate) * up, [T, I]; activation is "silu", "gelu_tanh" or "gelu"."""

    def sample(self, logits: Tensor, params: SamplingBatch) -> Tensor:
        """logits [R, V] float32 -> token ids [R] int64.

        Rows of temperature 0 take the first maximum. Others divide by the temperature, keep the top_k largest, of those
        the smallest set with probability >= top_p, of those the ones with p >= min_p * max p, and invert the cumulative
        distribution (likeliest first, ties by token id) at `uniform`.
        """
