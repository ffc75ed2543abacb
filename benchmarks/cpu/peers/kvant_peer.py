"""kvant through its engine, as the server and the pipeline use it: requests in, token events out."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from protocol import Job, PeerError, Timing

import kvant
from kvant import EngineConfig, SamplingParams
from kvant.engine.build import serve_model
from kvant.engine.sequence import Failure, Request, TokenEvent


class KvantPeer:
    """4-bit weights in groups of 32, as Q4_0 has them. Prompts stay in the prefix cache."""

    def __init__(self, job: Job) -> None:
        config = EngineConfig(
            weights="int4",
            weights_group_size=32,
            kv_cache_dtype=job.kv_cache,
            num_threads=job.threads,
            max_model_len=job.max_length,
            max_num_seqs=job.max_sequences,
            num_kv_blocks=job.cache_tokens // EngineConfig.block_size,
        )
        self._engine = serve_model(job.model, config).engine
        self.details: Mapping[str, Any] = {
            "version": kvant.__version__,
            "torch": torch.__version__,
            "weights": f"{config.weights}, groups of {config.weights_group_size}",
            "cache": self._engine.core.memory.describe(),
            "max_num_batched_tokens": config.max_num_batched_tokens,
        }

    def prefill(self, prompt: list[int]) -> Timing:
        """From the submission to the first token."""
        started = time.monotonic()
        [[first]] = self._generate([prompt], 1)
        return Timing(len(prompt), first - started)

    def decode(self, prompts: list[list[int]], tokens: int) -> Timing:
        """Of steps in which every sequence decodes."""
        self._generate(prompts, 1)  # so that all find their prompts cached, and decode from almost the same step on
        return while_all_decode(self._generate(prompts, tokens + 1))

    def _generate(self, prompts: Sequence[list[int]], tokens: int) -> list[list[float]]:
        """When each token of each prompt came, in seconds."""
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        sinks = [_Sink() for _ in prompts]
        for prompt, sink in zip(prompts, sinks, strict=True):
            self._engine.submit(prompt, sampling, sink)
        return [sink.wait() for sink in sinks]


class _Sink:
    """Notes times on the engine's thread and wakes nobody before the end."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._error: Exception | None = None
        self._done = threading.Event()

    def __call__(self, request: Request, event: TokenEvent | Failure) -> None:
        if isinstance(event, Failure):
            self._error = event.error
            self._done.set()
            return
        self._times.append(event.time)
        if event.finish_reason is not None:
            self._done.set()

    def wait(self) -> list[float]:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._times


def while_all_decode(times: Sequence[Sequence[float]]) -> Timing:
    """The tokens that came after every sequence had its first, until one had its last.

    Raises:
        PeerError: there are none.
    """
    start, end = max(each[0] for each in times), min(each[-1] for each in times)
    tokens = sum(start < moment <= end for each in times for moment in each)
    if not tokens:
        raise PeerError("the sequences never decoded together; decode more tokens (--tokens)")
    return Timing(tokens, end - start)


def open_peer(job: Job) -> KvantPeer:
    """Load the model."""
    return KvantPeer(job)
