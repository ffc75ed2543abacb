"""The engine's heart, without threads: requests in, steps, events out."""

from __future__ import annotations

import random
from collections.abc import Sequence as List
from dataclasses import dataclass

import torch

from kvant.cache.blocks import BlockPool
from kvant.cache.memory import available_memory, device_memory
from kvant.cache.prefix import PrefixTree
from kvant.cache.store import KVStore, MemoryReport, SwapSpace, fit_pool
from kvant.config import EngineConfig, SamplingParams
from kvant.engine.graphs import StepGraphs
from kvant.engine.profile import step_memory
from kvant.engine.recorder import CudaRecorder
from kvant.engine.runner import Flight, Runner
from kvant.engine.scheduler import Scheduler
from kvant.engine.sequence import Failure, Plan, Request, Sink, TokenEvent
from kvant.errors import ConfigError, MemoryFitError, NotFiniteError, RequestError
from kvant.formats.kv import KVPlan, resolve_kv_format
from kvant.weights.load import LoadedModel

_BURST_STEPS = 8  # what the host does between two steps is then little beside them, however small the model


@dataclass(frozen=True)
class EngineStats:
    """The engine at one moment. Blocks are used by running requests, cached for later ones, or free.

    Of all `preemptions` so far, `swaps` kept their KV in the swap space; the others are computed again.
    """

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_cached: int
    kv_blocks_total: int
    preemptions: int
    swaps: int
    swap_blocks_used: int
    swap_blocks_total: int
    healthy: bool


class Core:
    """One model, its KV store and its scheduler. Not thread-safe: `Engine` owns the thread that calls it.

    `interrupt` may be set from anywhere: a burst then ends with the step that it is at.

    Args:
        model: ready to run.
        config: limits, KV format and memory.
        end_ids: ids that end a text by the tokenizer, beside those that the model's configs name.
        kv: how each layer keeps its KV; None takes the config's kv_cache_dtype everywhere, without statistics.
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig, end_ids: List[int] = (), kv: KVPlan | None = None
    ) -> None:
        spec = model.spec
        plan = kv or KVPlan.uniform(resolve_kv_format(config.kv_cache_dtype, model.dtype), len(spec.layers))
        if config.max_model_len is not None and config.max_model_len > spec.max_position:
            raise ConfigError(
                f"max_model_len={config.max_model_len} exceeds the {spec.max_position} tokens this model is made for"
            )
        device = model.decoder.ops.device
        limits = config.limits(device.type)
        self.memory: MemoryReport = _fit(model, config, plan)
        self.max_model_len = config.max_model_len or min(spec.max_position, self.memory.tokens)
        self.prefix_caching = config.enable_prefix_caching
        self._model = model
        # Some configs name ids that the model has no logits for, as -1 for none.
        self._end_ids = frozenset(range(spec.vocab_size)).intersection((*model.eos_token_ids, *end_ids))
        self._limits = limits
        self._seeds = random.Random(config.seed)
        self._pool = BlockPool(self.memory.num_blocks)
        self._swap = BlockPool(self.memory.swap_blocks)
        self._tree = PrefixTree(self._pool, self.memory.paging) if config.enable_prefix_caching else None
        recorded = _records(model, config)
        # One block is nobody's: recorded steps write there what is beyond the batch.
        self.store = KVStore.allocate(spec.kv_shape, plan, self.memory.num_blocks + recorded, config.block_size, device)
        graphs = self._record() if recorded else None
        self._runner = Runner(model.decoder, self.store, SwapSpace(self.store, self.memory.swap_blocks), graphs)
        self._scheduler = self._schedule()
        self._flight: Flight | None = None
        self.interrupt = self._runner.interrupt

    @property
    def device(self) -> torch.device:
        """Where it computes; on a GPU, in threads whose current device that is."""
        return self._model.decoder.ops.device

    def _schedule(self) -> Scheduler:
        limits = self._limits
        bursts = not limits.overlapping and self._model.decoder.bursts(self.store.layers)
        return Scheduler(
            self._pool,
            self._tree,
            swap=self._swap,
            paging=self.memory.paging,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            max_steps=_BURST_STEPS if bursts else 1,
        )

    def _record(self) -> StepGraphs:
        try:
            return StepGraphs(
                self._model.decoder,
                self.store,
                spare_block=self.memory.num_blocks,
                limits=self._limits,
                max_model_len=self.max_model_len,
                recorder=CudaRecorder(),
            )
        except torch.OutOfMemoryError as error:
            raise MemoryFitError(
                "recording steps takes more memory than the KV cache leaves; lower kv_cache_memory or "
                "max_num_seqs, or set enforce_eager=True"
            ) from error

    def request(self, prompt: List[int], sampling: SamplingParams, sink: Sink) -> Request:
        """A request that this engine can serve, not yet queued. Safe to call from any thread.

        Raises:
            RequestError: the prompt is empty or too long, a token id is unknown, or n exceeds max_num_seqs.
        """
        self._check(prompt, sampling)
        rope = self._model.spec.length_rope
        ends = () if sampling.ignore_eos else self._end_ids
        request = Request(
            prompt=tuple(prompt),
            sampling=sampling,
            seed=self._seeds.getrandbits(64) if sampling.seed is None else sampling.seed,
            sink=sink,
            stop_ids=frozenset(sampling.stop_token_ids or ()).union(ends),
            salt=len(prompt) if rope is not None and len(prompt) > rope.original_length else None,
        )
        # Cached tokens are not computed again, so they would have no log-probabilities.
        request.sequences[0].may_reuse = sampling.prompt_logprobs is None
        return request

    def _check(self, prompt: List[int], sampling: SamplingParams) -> None:
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; with room for one output token the limit is "
                f"{self.max_model_len - 1} (max_model_len={self.max_model_len}); shorten it, or raise max_model_len or "
                "the KV cache's memory"
            )
        vocab = self._model.spec.vocab_size
        named = (*prompt, *(sampling.logit_bias or ()), *(sampling.stop_token_ids or ()))
        unknown = next((token for token in named if not 0 <= token < vocab), None)
        if unknown is not None:
            raise RequestError(f"token id {unknown} is unknown; this model has ids 0 to {vocab - 1}")
        if sampling.n > self._limits.max_num_seqs:
            raise RequestError(f"n={sampling.n} exceeds max_num_seqs={self._limits.max_num_seqs}")

    def add(self, request: Request) -> None:
        """Queue a request."""
        self._scheduler.add(request)

    def abort(self, request: Request, index: int | None = None) -> list[TokenEvent]:
        """End a request or one of its choices; all that it holds is free afterwards."""
        return self._scheduler.abort(request, index)

    def has_work(self) -> bool:
        """Whether a step would compute anything, or has results to fetch."""
        return self._flight is not None or self._scheduler.has_work()

    def step(self) -> List[tuple[Request, TokenEvent | Failure]]:
        """One step, or a burst of them: plan, run, commit.

        Requests whose numbers are not finite fail; the others lose nothing by it.
        Where steps overlap, the next one is launched before the host waits for this one's tokens.
        """
        flight, self._flight = self._flight, None
        plan = self._scheduler.plan() if flight is None else flight.plan
        try:
            flight = flight or self._runner.launch(plan)
            launched = self._launch_after(flight) if self._limits.overlapping else None
            sampled = flight.sampled()
        except NotFiniteError as error:
            return self._drop(plan, error)  # with what was launched after it
        self._flight = launched
        return [
            event for step, tokens in enumerate(sampled) for event in self._scheduler.commit(plan.after(step), tokens)
        ]

    def _launch_after(self, flight: Flight) -> Flight | None:
        """The step after one whose tokens are not known, where it can be planned."""
        following = self._scheduler.ahead(flight.plan)
        try:
            return None if following is None else self._runner.launch(following, flight)
        except NotFiniteError:  # of a backend that sees it at once: planned again, it says so as a step of its own
            return None

    def _drop(self, plan: Plan, error: NotFiniteError) -> list[tuple[Request, Failure]]:
        """End the requests that the error's tokens belong to. What the step computed is computed again."""
        owners = [row.sequence for row in plan.rows for _ in range(row.start, row.stop)]
        bad = [owners[token] for token in error.tokens or range(len(owners))]
        # Of a sequence that has ended since, nobody wants the token.
        culprits = dict.fromkeys(sequence.request for sequence in bad if sequence.finish_reason is None)
        for request in culprits:
            self.abort(request)
        return [(request, Failure(error)) for request in culprits]

    def stats(self) -> EngineStats:
        """What is running, waiting, and held."""
        used = self._scheduler.blocks_used
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            kv_blocks_used=used,
            kv_blocks_cached=self._pool.num_blocks - self._pool.num_free - used,
            kv_blocks_total=self._pool.num_blocks,
            preemptions=self._scheduler.preemptions,
            swaps=self._scheduler.swaps,
            swap_blocks_used=self._swap.num_blocks - self._swap.num_free,
            swap_blocks_total=self._swap.num_blocks,
            healthy=True,
        )


def _records(model: LoadedModel, config: EngineConfig) -> bool:
    """Whether steps are recorded."""
    ops = model.decoder.ops
    return ops.device.type == "cuda" and ops.capturable and not config.enforce_eager


def _fit(model: LoadedModel, config: EngineConfig, plan: KVPlan) -> MemoryReport:
    """The pool's size, on the device that computes."""
    spec, device = model.spec, model.decoder.ops.device
    if device.type == "cuda":
        limits = config.limits(device.type)
        needed = step_memory(model.decoder, limits, plan, config.block_size)
        if _records(model, config):
            # Recorded steps have memory of their own, no more than the largest step's, and their logits are kept.
            needed = 2 * needed + limits.max_num_seqs * spec.vocab_size * torch.float32.itemsize
        free = max(device_memory(device) - needed, 0)
        return fit_pool(config, spec.kv_shape, plan, spec.max_position, free, device.type, available_memory())
    # Mapped weights will take theirs when they are used.
    free = max(available_memory() - model.mapped_bytes, 0)
    return fit_pool(config, spec.kv_shape, plan, spec.max_position, free)
