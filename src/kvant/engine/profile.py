"""What a step takes of a GPU's memory, found by running the largest one."""

from __future__ import annotations

import torch

from kvant.cache.blocks import Paging
from kvant.cache.store import KVStore
from kvant.config import StepLimits
from kvant.formats.kv import KVPlan
from kvant.kernels.ops import AttentionBatch, SamplingBatch
from kvant.models.decoder import Decoder


@torch.inference_mode()
def step_memory(decoder: Decoder, limits: StepLimits, plan: KVPlan, block_size: int) -> int:
    """Bytes that the largest step takes beside weights and KV cache: activations, logits, workspaces of libraries.

    Args:
        decoder: on a GPU.
        limits: of a step.
        plan: how each layer keeps its KV.
        block_size: of the cache.
    """
    device = decoder.ops.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    cache = run_largest_step(decoder, limits, plan, block_size)
    torch.cuda.synchronize(device)
    return max(torch.cuda.max_memory_allocated(device) - before - cache, 0)


def run_largest_step(decoder: Decoder, limits: StepLimits, plan: KVPlan, block_size: int) -> int:
    """One prompt as long as a step may be, in a cache of its own, and a token for every sequence; the cache's bytes."""
    device, tokens = decoder.ops.device, min(limits.max_num_batched_tokens, decoder.spec.max_position)
    paging = Paging(block_size, plan.lead)
    blocks = paging.blocks_for(tokens)
    store = KVStore.allocate(decoder.spec.kv_shape, plan, blocks, block_size, device)
    positions = torch.arange(tokens, device=device)
    batch = AttentionBatch(
        positions=positions,
        slots=positions + paging.lead,
        query_starts=(0, tokens),
        context_lens=(tokens,),
        block_tables=torch.arange(blocks, device=device).unsqueeze(0),
    )
    ids = positions % decoder.spec.vocab_size
    hidden = decoder.forward(ids, batch, positions + 1, store.layers)
    logits = decoder.logits(hidden[:1].expand(limits.max_num_seqs, -1).contiguous())
    decoder.ops.sample(logits.clone(), _all_wishes(limits.max_num_seqs))  # penalties are set in a copy
    return store.blocks.nbytes


def _all_wishes(rows: int) -> SamplingBatch:
    """Rows that are drawn with every filter there is."""
    half = torch.full((rows,), 0.5)
    top_k = torch.full((rows,), 8)
    return SamplingBatch(temperature=half, top_k=top_k, top_p=half, min_p=half, uniform=half.double())
