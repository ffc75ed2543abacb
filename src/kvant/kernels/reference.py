"""Every op in plain PyTorch: slow, exact, runs everywhere, and the truth that other backends are held to.

Its results do not depend on the batch: a token's activations and KV codes are the same bits whatever else is in the
step and however its prompt was cut into chunks. Matrix products are where that could fail, since BLAS picks its kernel
by shape: linear layers multiply `LINEAR_TILE` rows at a time, attention pads its rows to `ROW_TILE`, and sums over the
context go tile by tile, so every row is summed in one fixed order. A cache of few bits needs this: one flipped code in
an early layer changes a text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvant.formats.kv import KVLayer
from kvant.formats.weight import InputCodes, PackedWeight
from kvant.kernels.ops import AttentionBatch, AttentionShape, SamplingBatch

CPU = torch.device("cpu")
LINEAR_TILE = 32
ROW_TILE = 4
CONTEXT_TILE = 128
QUERY_TILE = 128  # query tokens scored at once: bounds the score matrix


def _pad_rows(x: Tensor, multiple: int) -> Tensor:
    """Zero rows appended along the last-but-one dimension up to a multiple."""
    missing = -x.shape[-2] % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


@dataclass(frozen=True)
class MatrixOnCodes:
    """A matrix [N, K] float32 whose inputs are rounded to 8 bits before the product."""

    values: Tensor
    inputs: InputCodes


class ReferenceOps:
    """The ops of `kernels.ops.Ops`, documented there. A backend may subclass it and override what it has."""

    name = "reference"
    packed_weights = False
    capturable = False

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device

    def prepare(self, weight: PackedWeight) -> Any:
        weight = weight.to(self.device)
        if weight.inputs is not None:
            return MatrixOnCodes(weight.dequantize(torch.float32), weight.inputs)
        return weight.planes["weight"].data if weight.format == "dense" else weight.dequantize(torch.float32)

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, MatrixOnCodes):
            x, weight = rounded_inputs(x, weight.inputs), weight.values
        matrix, tiles = weight.to(x.dtype), _pad_rows(x, LINEAR_TILE).split(LINEAR_TILE)
        return torch.cat([F.linear(tile, matrix, bias) for tile in tiles])[: x.shape[0]]

    def embedding(self, ids: Tensor, weight: Any) -> Tensor:
        return F.embedding(ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        normed: Tensor = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * weight).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, reader: Any = None
    ) -> tuple[Any, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def rope_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        cache: KVLayer,
        batch: AttentionBatch,
    ) -> Tensor:
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        cache.write(k.transpose(0, 1), v.transpose(0, 1), batch.slots, batch.positions)
        return q

    def attention(self, q: Tensor, cache: KVLayer, batch: AttentionBatch, shape: AttentionShape) -> Tensor:
        out = torch.empty_like(q)
        for sequence, (start, stop) in enumerate(pairwise(batch.query_starts)):
            slots = batch.context_lens[sequence] + cache.lead
            blocks = _padded_blocks(batch.block_tables[sequence], slots, cache.block_size)
            keys, values = cache.read("key", blocks), cache.read("value", blocks)
            # What lies behind the context is another text's, or nobody's: 0 * NaN would still be NaN.
            values[:, batch.context_lens[sequence] :] = 0
            for first in range(start, stop, QUERY_TILE):
                rows = slice(first, min(first + QUERY_TILE, stop))
                out[rows] = _attend(q[rows], keys, values, batch.positions[rows], shape)
        return out

    def gated(self, x: Tensor, activation: str) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        if activation == "silu":
            return F.silu(gate) * up
        return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up

    def sample(self, logits: Tensor, params: SamplingBatch) -> Tensor:
        tokens = logits.argmax(-1)
        drawn = params.temperature.nonzero().squeeze(-1)
        if drawn.numel():
            rows = params.rows(drawn).to(logits.device)
            drawn = drawn.to(logits.device)
            tokens[drawn] = _draw(logits[drawn], rows)
        return tokens


def rounded_inputs(x: Tensor, inputs: InputCodes) -> Tensor:
    """x [T, K] as its codes give it, in its dtype. What is not finite stays so."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127 if inputs.scale is None else inputs.scale
    steps = torch.where(scale == 0, 0.0, 1 / scale)
    return ((wide * steps).round_().clamp_(-127, 127) * scale).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] rotated by cos, sin [T, R / 2] in pairs (i, i + R / 2); elements from R on pass through."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


def _padded_blocks(table: Tensor, slots: int, block_size: int) -> Tensor:
    """The blocks of so many slots, the last one repeated up to whole context tiles; the mask hides what that adds."""
    used = -(-slots // block_size)
    tile = max(CONTEXT_TILE // block_size, 1)
    return table[torch.arange(-(-used // tile) * tile, device=table.device).clamp(max=used - 1)]


def _attend(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, shape: AttentionShape) -> Tensor:
    """Queries [T, H, D] over one sequence's keys and values [G, context, D]: [T, H, D]."""
    tokens, heads, dim = q.shape
    group = heads // shape.num_kv_heads
    # Query heads that share a KV head become rows of one product: [G, group * T, D].
    rows = q.float().transpose(0, 1).reshape(shape.num_kv_heads, group * tokens, dim)
    scores = _pad_rows(rows, ROW_TILE) @ keys.transpose(1, 2)
    scores = _mask(scores[:, : group * tokens].unflatten(1, (group, tokens)) * shape.scale, positions, shape)
    weights = torch.softmax(scores, dim=-1).flatten(1, 2)
    mixed = _mix(_pad_rows(weights, ROW_TILE), values)[:, : group * tokens]
    return mixed.reshape(heads, tokens, dim).transpose(0, 1).to(q.dtype)


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """weights [G, rows, context] @ values [G, context, D], the context's tiles summed from first to last."""
    tiles = values.shape[1] // CONTEXT_TILE
    by_tile: Tensor = weights.unflatten(2, (tiles, CONTEXT_TILE)).transpose(1, 2) @ values.unflatten(
        1, (tiles, CONTEXT_TILE)
    )
    mixed: Tensor = reduce(torch.add, by_tile.unbind(1))
    return mixed


def _mask(scores: Tensor, positions: Tensor, shape: AttentionShape) -> Tensor:
    """Soft-cap, then hide what lies in the future or before the window; scores [..., T, context]."""
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    distance = positions.unsqueeze(1) - torch.arange(scores.shape[-1], device=positions.device)
    hidden = distance < 0
    if shape.window is not None:
        hidden |= distance >= shape.window
    return scores.masked_fill(hidden, float("-inf"))


def _draw(logits: Tensor, params: SamplingBatch) -> Tensor:
    """One token a row by inverting the filtered cumulative distribution at `uniform`."""
    scaled = logits.double() / params.temperature.double().unsqueeze(1)
    values, ids = scaled.sort(dim=-1, descending=True, stable=True)
    vocab = logits.shape[-1]
    limit = torch.where(params.top_k > 0, params.top_k, vocab).unsqueeze(1)
    values = values.masked_fill(torch.arange(vocab, device=values.device) >= limit, float("-inf"))
    probs = values.softmax(-1)
    before = probs.cumsum(-1) - probs
    # The likeliest token always stays, whatever the bounds.
    drop = (before >= params.top_p.unsqueeze(1)) | (probs < params.min_p.unsqueeze(1) * probs[:, :1])
    drop[:, 0] = False
    cumulative = probs.masked_fill(drop, 0.0).cumsum(-1)
    target = params.uniform.unsqueeze(1) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).clamp(max=vocab - 1)
    return ids.gather(1, chosen).squeeze(1)
