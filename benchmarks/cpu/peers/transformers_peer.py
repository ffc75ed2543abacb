"""transformers in float32, its weights dequantized from the GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from protocol import Job, Timing
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache


class TransformersPeer:
    """One model, and the cache of each shape of prompts that was asked for."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        path = Path(job.model)
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        self._model = model.eval()
        self._held: dict[tuple[int, int], tuple[list[list[int]], DynamicCache, Tensor]] = {}
        self.details: Mapping[str, Any] = {
            "version": transformers.__version__,
            "torch": torch.__version__,
            "weights": "float32",
            "attention": self._model.config._attn_implementation,
        }

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> Timing:
        """From the call to the first token."""
        started = perf_counter()
        self._next(torch.tensor([prompt]), DynamicCache())
        return Timing(len(prompt), perf_counter() - started)

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], tokens: int) -> Timing:
        """One call a step, with a token of each sequence."""
        cache, ids = self._hold(prompts)
        started = perf_counter()
        for _ in range(tokens):
            ids = self._next(ids, cache)
        return Timing(tokens * len(prompts), perf_counter() - started)

    def _hold(self, prompts: list[list[int]]) -> tuple[DynamicCache, Tensor]:
        """A cache of these prompts and nothing after them, and the first token of each one's output, [sequences, 1]."""
        key = (len(prompts[0]), len(prompts))
        if key not in self._held or self._held[key][0] != prompts:
            cache = DynamicCache()
            self._held[key] = (prompts, cache, self._next(torch.tensor(prompts), cache))
        _, cache, first = self._held[key]
        generated = cache.get_seq_length() - len(prompts[0])
        if generated:
            cache.crop(-generated)
        return cache, first

    def _next(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        output = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        following: Tensor = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        return following


def open_peer(job: Job) -> TransformersPeer:
    """Load the model."""
    return TransformersPeer(job)
