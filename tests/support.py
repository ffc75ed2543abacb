"""Running models in tests without an engine: one text through the blocked cache, in chunks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kvant.cache.blocks import Paging
from kvant.cache.store import KVStore
from kvant.formats.kv import KVPlan, resolve_kv_format
from kvant.kernels.ops import AttentionBatch
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.select import available_backends
from kvant.models.decoder import Decoder
from kvant.models.rope import rope_lengths
from kvant.weights.load import load_model

BLOCK_SIZE = 16
# Of the CPU, best first; none without a library.
NATIVE = tuple(name for name in available_backends() if name not in (ReferenceOps.name, "triton"))


class SingleText:
    """One sequence in a store of its own, its blocks deliberately out of order."""

    def __init__(
        self,
        decoder: Decoder,
        prompt_length: int,
        capacity: int,
        kv_cache_dtype: str = "fp32",
        kv: KVPlan | None = None,
    ) -> None:
        self._decoder = decoder
        self._prompt_length = prompt_length
        plan = kv or KVPlan.uniform(resolve_kv_format(kv_cache_dtype, torch.float32), len(decoder.spec.layers))
        blocks = Paging(BLOCK_SIZE, plan.lead).blocks_for(capacity)
        self.store = KVStore.allocate(decoder.spec.kv_shape, plan, blocks, BLOCK_SIZE)
        self._table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0))
        self._computed = 0

    def feed(self, ids: list[int]) -> Tensor:
        """Logits [len(ids), vocab] of the next tokens."""
        start, stop = self._computed, self._computed + len(ids)
        positions = torch.arange(start, stop)
        slots = positions + self.store.paging.lead
        batch = AttentionBatch(
            positions=positions,
            slots=self._table[slots // BLOCK_SIZE] * BLOCK_SIZE + slots % BLOCK_SIZE,
            query_starts=(0, len(ids)),
            context_lens=(stop,),
            block_tables=self._table.unsqueeze(0),
        )
        hidden = self._decoder.forward(torch.tensor(ids), batch, self._lengths(positions), self.store.layers)
        self._computed = stop
        return self._decoder.logits(hidden)

    def _lengths(self, positions: Tensor) -> Tensor:
        rope = self._decoder.spec.length_rope
        if rope is None:
            return positions + 1
        return rope_lengths(rope, torch.full_like(positions, self._prompt_length), positions)


def model_logits(
    path: Path, ids: list[int], *, chunk: int | None = None, kv_cache_dtype: str = "fp32", dtype: str = "float32"
) -> Tensor:
    """Logits [len(ids), vocab] of a whole text, `chunk` tokens at a time (None: all at once)."""
    decoder = load_model(path, dtype=dtype, ops=ReferenceOps()).decoder
    text = SingleText(decoder, len(ids), len(ids), kv_cache_dtype)
    step = chunk or len(ids)
    return torch.cat([text.feed(ids[start : start + step]) for start in range(0, len(ids), step)])


def model_logits_generate(path: Path, prompt_ids: list[int], n: int) -> tuple[list[int], Tensor]:
    """Greedy decoding one by one: the n tokens and the logits [n, vocab] each was chosen from."""
    decoder = load_model(path, dtype="float32", ops=ReferenceOps()).decoder
    text = SingleText(decoder, len(prompt_ids), len(prompt_ids) + n)
    logits = [text.feed(prompt_ids)[-1]]
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < n:
        logits.append(text.feed([tokens[-1]])[-1])
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)
