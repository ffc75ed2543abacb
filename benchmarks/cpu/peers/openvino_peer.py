"""OpenVINO GenAI, from the Q4_0 file that the peer llama.cpp makes: it reads GGUF, so nothing has to be exported."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import Job, PeerError, Timing

CACHE_GIB = 2


class OpenVinoPeer:
    """Its pipeline with continuous batching. Prompts stay in the prefix cache."""

    def __init__(self, job: Job) -> None:
        if not job.q4_0.exists():
            raise PeerError(f"{job.q4_0} is missing; the peer llama.cpp makes it: name both, llama.cpp first")
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.max_num_seqs = job.max_sequences
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": job.threads, "KV_CACHE_PRECISION": job.kv_cache}
        self._pipeline = openvino_genai.LLMPipeline(job.q4_0, "CPU", scheduler_config=scheduler, **properties)
        self.details: Mapping[str, Any] = {"version": openvino_genai.__version__, **properties}

    def prefill(self, prompt: list[int]) -> Timing:
        """From the call to the first token."""
        started = perf_counter()
        self._generate([prompt], 1)
        return Timing(len(prompt), perf_counter() - started)

    def decode(self, prompts: list[list[int]], tokens: int) -> Timing:
        """From the first step that gave tokens to the last, by the pipeline's own clock."""
        self._generate(prompts, 1)  # so that the prompts are cached
        raw = self._generate(prompts, tokens + 1).perf_metrics.raw_metrics
        milliseconds = raw.m_new_token_times[-1] - raw.m_new_token_times[0]
        return Timing(sum(raw.m_batch_sizes[1:]), milliseconds / 1000)

    def _generate(self, prompts: list[list[int]], tokens: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = tokens, True, False
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return self._pipeline.generate(inputs, config)


def open_peer(job: Job) -> OpenVinoPeer:
    """Load the model."""
    return OpenVinoPeer(job)
