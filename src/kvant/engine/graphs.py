"""Recorded steps: which of them there are, and which one a batch takes."""

from __future__ import annotations

import torch
from torch import Tensor

from kvant.cache.store import KVStore
from kvant.config import StepLimits
from kvant.engine.batch import Batch
from kvant.engine.decode_graphs import DecodeGraphs
from kvant.engine.prompt_graphs import PromptGraphs
from kvant.engine.recorder import Recorder
from kvant.models.decoder import Decoder


class StepGraphs:
    """A decoder's steps, recorded when it is made.

    Args:
        decoder: the model.
        store: its KV store; `spare_block` is one of its blocks that no sequence has.
        spare_block: see there.
        limits: of a step.
        max_model_len: the longest context.
        recorder: how a step is recorded.
    """

    def __init__(
        self,
        decoder: Decoder,
        store: KVStore,
        *,
        spare_block: int,
        limits: StepLimits,
        max_model_len: int,
        recorder: Recorder,
    ) -> None:
        logits = torch.zeros(limits.max_num_seqs, decoder.spec.vocab_size, device=decoder.ops.device)
        # The largest first: the others fit in its memory.
        self._prompts = PromptGraphs(
            decoder,
            store,
            spare_block=spare_block,
            logits=logits,
            max_tokens=limits.max_num_batched_tokens,
            max_model_len=max_model_len,
            recorder=recorder,
        )
        self._decodes = DecodeGraphs(
            decoder, store, spare_block=spare_block, logits=logits, max_model_len=max_model_len, recorder=recorder
        )

    def run(self, batch: Batch, ends: list[int], ids: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """The logits [R, vocab] float32 of the tokens `ends`, and [T] int32, not 0 where a key or value is not finite.

        Both are valid until the next run. None where no such step is recorded.

        Args:
            batch: of the host.
            ends: R of its tokens, in order.
            ids: [T] int64 on the device, in place of the batch's, of steps that decode alone.
        """
        if self._decodes.fits(batch, ends):
            return self._decodes.run(batch, ids)
        return self._prompts.run(batch, ends) if ids is None else None
