"""One text through a decoder and a KV cache of its own, without an engine: for measuring, not for serving."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvant.cache.blocks import Paging
from kvant.cache.store import KVStore
from kvant.formats.kv import KVPlan, check_finite
from kvant.kernels.ops import AttentionBatch
from kvant.models.decoder import Decoder
from kvant.models.rope import rope_lengths

CHUNK = 256  # tokens a step: bounds the activations
BLOCK_SIZE = 64


def new_store(decoder: Decoder, plan: KVPlan, tokens: int) -> KVStore:
    """A store for one text of so many tokens, whose blocks `force` takes in order."""
    blocks = Paging(BLOCK_SIZE, plan.lead).blocks_for(tokens)
    return KVStore.allocate(decoder.spec.kv_shape, plan, blocks, BLOCK_SIZE, decoder.ops.device)


@torch.inference_mode()
def force(decoder: Decoder, store: KVStore, ids: Sequence[int], length: int) -> Tensor:
    """The hidden states after each token of a text, [len(ids), hidden]; every key and value attended is the stored one.

    Args:
        decoder: the model.
        store: from `new_store`, unused.
        ids: the text.
        length: of the prompt that the text is the beginning of; it matters where RoPE depends on it.

    Raises:
        NotFiniteError: a key or a value is not finite.
    """
    device = decoder.ops.device
    tokens, table = torch.tensor(ids, device=device), torch.arange(store.num_blocks, device=device).unsqueeze(0)
    states = []
    for positions in torch.arange(len(tokens), device=device).split(CHUNK):
        batch = AttentionBatch(
            positions=positions,
            slots=positions + store.paging.lead,
            query_starts=(0, len(positions)),
            context_lens=(int(positions[-1]) + 1,),
            block_tables=table,
        )
        lengths = _rope_lengths(decoder, length, positions)
        states.append(decoder.forward(tokens[positions], batch, lengths, store.layers))
        if batch.reported_not_finite is not None:
            check_finite(batch.reported_not_finite == 0)
    return torch.cat(states)


def _rope_lengths(decoder: Decoder, length: int, positions: Tensor) -> Tensor:
    rope = decoder.spec.length_rope
    if rope is None:
        return positions + 1
    return rope_lengths(rope, torch.full_like(positions, length), positions)
