"""The engine from request to token, on random weights of real shapes: speed, memory, throughput."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from gpu.case import Case
from gpu.lengths import OUTPUT_MEAN, PROMPT_MEAN, Lengths, chat_lengths
from gpu.machine import Machine
from gpu.scenes import BLOCK_SIZE, made_up_plan, plan_on
from gpu.shapes import CONFIGS, kv_formats, spec_of
from gpu.weights import decoder_weights
from kvant.cache.blocks import Paging
from kvant.config import EngineConfig, SamplingParams
from kvant.engine.core import Core
from kvant.engine.sequence import Failure, Request, TokenEvent
from kvant.formats.kv import KV_FORMATS, KVPlan
from kvant.models.decoder import Decoder
from kvant.weights.load import LoadedModel

BATCHES = (1, 4, 16, 32, 64, 100)  # with 1024 new tokens each
LENGTHS = (512, 1024, 2048, 4096, 8192)  # of one sequence
PROMPTS = (16, 150, 500, 1000, 2000)
POOLS = (4, 16)  # GiB for the KV cache, whatever its format
_CHUNK = 2048  # tokens of a step


@dataclass(frozen=True)
class Setup:
    """A model with the formats of its layers' weights, its head's and its KV cache."""

    model: str
    weights: str
    kv: str
    head: str = "bf16"

    @property
    def tags(self) -> dict[str, Any]:
        """For a case."""
        weights = self.weights if self.head == "bf16" else f"{self.weights} head {self.head}"
        return {"model": self.model, "weights": weights, "kv": self.kv}


@dataclass(frozen=True)
class Made:
    """A model on the device, and the bytes of its weights."""

    model: LoadedModel
    weight_bytes: int


def cases(small: bool) -> list[Case]:
    """Decoding of each model, prompts, throughput in equal memory, then memory; a model's weights are used in a row."""
    return [*_decode_cases(small), *_prompt_cases(small), *_throughput_cases(small), *_memory_cases(small)]


def _decode_cases(small: bool) -> Iterator[Case]:
    models = ("llama-2-7b", "qwen-7b") if small else tuple(CONFIGS)
    plain, *few = kv_formats(small)
    setups = [Setup(model, weights, plain) for model in models for weights in (("w4",) if small else ("w4", "bf16"))]
    if not small:
        setups[1:1] = [Setup("llama-2-7b", "w4", kv) for kv in few]
        setups.append(Setup("llama-2-7b", "w4", "bf16", head="w8"))
        setups += [Setup("llama-2-7b", weights, "bf16") for weights in ("w8", "w8a8")]
    for setup in setups:
        target = setup == Setup("llama-2-7b", "w4", plain)
        yield Case("engine", {"what": "decode", **setup.tags}, partial(decode, setup), 45, target=target)


def _prompt_cases(small: bool) -> Iterator[Case]:
    for kv in kv_formats(small):
        setup = Setup("llama-2-7b", "w4", kv)
        yield Case("engine", {"what": "prompt", **setup.tags}, partial(prompt, setup), 45)


def _throughput_cases(small: bool) -> Iterator[Case]:
    for model, pool in (("llama-2-7b", POOLS[0]), ("llama-2-7b", POOLS[1]), ("llama-3-8b", POOLS[0])):
        for kv in kv_formats(small):
            setup = Setup(model, "w4", kv)
            if not small or (model, pool, kv) == ("llama-2-7b", POOLS[0], "int8"):
                tags = {"what": "throughput", **setup.tags, "pool_gib": pool}
                target = (model, pool) == ("llama-2-7b", POOLS[0])
                yield Case("engine", tags, partial(throughput, setup, pool), 90, target=target)


def _memory_cases(small: bool) -> Iterator[Case]:
    pairs = (("bf16", "bf16"), ("bf16", "int8"), ("w4", "bf16"), ("w4", "int4"))
    first = (("bf16", "int8", 100), ("w4", "int4", 100))  # the targets
    points = [*first, *((w, kv, b) for w, kv in pairs for b in BATCHES if (w, kv, b) not in first)]
    for weights, kv, batch in points[1:2] if small else points:
        setup = Setup("qwen-7b", weights, kv)
        tags = {"what": "memory", **setup.tags, "batch": batch, "new": 1024}
        target = (weights, kv, batch) in first
        yield Case("engine", tags, partial(memory, setup, batch, 1024), 60, target=target)
    for weights, kv in () if small else pairs:
        for length in LENGTHS:
            if length != 1024:  # it is among the batches
                setup = Setup("qwen-7b", weights, kv)
                tags = {"what": "memory", **setup.tags, "batch": 1, "new": length}
                yield Case("engine", tags, partial(memory, setup, 1, length), 15 + length / 80)


def decode(setup: Setup, machine: Machine) -> Mapping[str, Any]:
    """One sequence from a prompt of one token: 512 new ones a second."""
    new = 3 if machine.small else 512
    made = _make(machine, setup)
    core = core_of(machine, made.model, setup.kv, [Lengths(1, new)])
    run_requests(core, [Lengths(1, 1 if machine.small else 16)])  # compiles and captures what the steps launch
    served = run_requests(core, [Lengths(1, new)])
    return {
        "tokens_per_second": new / served.seconds,
        "step_ms": median(served.steps) * 1e3,
        "new": new,
        "weight_bytes": made.weight_bytes,
        "read_bytes": _read_bytes(made, core, new),
    }


def _read_bytes(made: Made, core: Core, new: int) -> int:
    """What a step reads on average: all weights but the embedding, whose rows are looked up, and the KV cache."""
    spec = made.model.spec
    embedding = 0 if spec.tied_embeddings else 2 * spec.vocab_size * spec.hidden_size
    return made.weight_bytes - embedding + core.memory.bytes_per_token * (1 + new // 2)


def prompt(setup: Setup, machine: Machine) -> Mapping[str, Any]:
    """From a request to its first token, milliseconds by the prompt's length: steps as they come, and all launched."""
    lengths = (1, 3) if machine.small else PROMPTS
    made = _make(machine, setup)
    figures = {}
    for name, eager in (("ms", False), ("launched_ms", True)):
        core = core_of(machine, made.model, setup.kv, [Lengths(max(lengths), 1)], enforce_eager=eager)
        figures[name] = {str(length): _first_token_ms(core, length) for length in lengths}
    return figures


def _first_token_ms(core: Core, prompt: int) -> float:
    run_requests(core, [Lengths(prompt, 1)])  # compiles what the step launches
    return median(run_requests(core, [Lengths(prompt, 1)]).seconds for _ in range(7)) * 1e3


def throughput(setup: Setup, pool_gib: int, machine: Machine) -> Mapping[str, Any]:
    """Requests with the lengths of chats, all there at the start, in a KV cache of so much memory.

    Measured until the last one has left the queue: after that the cache is not what limits it.
    """
    pool = 1 << 20 if machine.small else pool_gib << 30
    requests = chat_lengths(3, shrink=150) if machine.small else chat_lengths(_requests(setup.model, pool))
    made = _make(machine, setup)
    core = core_of(machine, made.model, setup.kv, requests, kv_cache_memory=pool, max_num_seqs=512)
    # All of it once, unmeasured: steps with prompts differ in what they are compiled for.
    run_requests(core, [Lengths(1, 1)] if machine.small else requests, while_queued=True)
    earlier = core.stats().preemptions
    served = run_requests(core, requests, while_queued=True)
    return {
        "output_tokens_per_second": served.tokens / served.seconds,
        "requests_per_second": served.finished / served.seconds,
        "requests": len(requests),
        "prompt_mean": sum(request.prompt for request in requests) / len(requests),
        "output_mean": sum(request.output for request in requests) / len(requests),
        "steps": len(served.steps),
        "pool_tokens": core.memory.tokens,
        "preemptions": core.stats().preemptions - earlier,
    }


def _requests(model: str, pool: int) -> int:
    """Four times as many as the pool holds at once in 4 bit: for all formats the same."""
    per_token = KV_FORMATS["int4"].bytes_per_token(spec_of(model, small=False).kv_shape)
    return int(4 * pool / per_token / (PROMPT_MEAN + OUTPUT_MEAN / 2))


def memory(setup: Setup, batch: int, new: int, machine: Machine) -> Mapping[str, Any]:
    """What a batch takes of the card, from prompts of one token, as the driver counts it; and how fast it goes."""
    batch, new = (2, 3) if machine.small else (batch, new)
    made = _make(machine, setup)
    requests = [Lengths(1, new - 1)] * batch  # together `new` tokens in the cache
    core = core_of(machine, made.model, setup.kv, requests)
    machine.tidy()  # what finding the free memory took
    if machine.cuda:
        torch.cuda.reset_peak_memory_stats()
    served = run_requests(core, requests)
    return {
        "weight_bytes": made.weight_bytes,
        "pool_bytes": core.memory.pool_bytes,
        "peak_bytes": _used() if machine.cuda else None,  # PyTorch gives nothing back before it is told to
        "allocated_bytes": torch.cuda.max_memory_allocated() if machine.cuda else None,
        "tokens_per_second": served.tokens / served.seconds,
    }


def _used() -> int:
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _make(machine: Machine, setup: Setup) -> Made:
    """The model of a setup; the one before goes first."""
    return machine.keep((setup.model, setup.weights, setup.head), partial(_new_model, machine, setup))


def _new_model(machine: Machine, setup: Setup) -> Made:
    spec = spec_of(setup.model, machine.small)
    weights, size = decoder_weights(machine, spec, setup.weights, setup.head)
    return Made(model_of(machine, Decoder(spec, weights, machine.ops)), size)


def model_of(machine: Machine, decoder: Decoder) -> LoadedModel:
    """A decoder as an engine takes it; there is no checkpoint."""
    source: Any = SimpleNamespace(path=Path("random"), config={}, generation={}, metadata={})
    return LoadedModel(decoder, source, machine.dtype, (), None)


def core_of(machine: Machine, model: LoadedModel, kv: str, requests: Sequence[Lengths], **different: Any) -> Core:
    """An engine with room for these requests at once, unless told otherwise."""
    machine.tidy()
    spec = model.spec
    layer = plan_on(machine, made_up_plan(kv, spec.num_kv_heads, spec.head_dim))
    plan = KVPlan(kv, (layer,) * len(spec.layers))
    longest = max(max(request.prompt + request.output for request in requests), 64)
    settings: dict[str, Any] = {
        "dtype": str(machine.dtype).removeprefix("torch."),
        "kv_cache_dtype": kv,
        "max_model_len": longest,
        "max_num_seqs": len(requests),
        "max_num_batched_tokens": _CHUNK,
        "block_size": BLOCK_SIZE,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if "kv_cache_memory" not in different:
        settings["num_kv_blocks"] = Paging(BLOCK_SIZE, plan.lead).blocks_for(longest) * len(requests)
    if machine.cuda:
        settings["device"] = "cuda"
    return Core(model, EngineConfig(**settings | different), kv=plan)


@dataclass
class Served:
    """What came of some requests.

    Attributes:
        steps: the seconds of each step.
        tokens: of all outputs.
        finished: requests that came to their end.
    """

    steps: list[float] = field(default_factory=list)
    tokens: int = 0
    finished: int = 0

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(self.steps)

    def take(self, events: Sequence[tuple[Request, TokenEvent | Failure]], seconds: float) -> None:
        """Count a step's events."""
        self.steps.append(seconds)
        for _, event in events:
            if isinstance(event, Failure):
                raise RuntimeError(f"a request failed: {event.message}")
            self.tokens += event.token_id is not None
            self.finished += event.finish_reason is not None


def run_requests(core: Core, lengths: Sequence[Lengths], while_queued: bool = False) -> Served:
    """Serve requests that arrive together, each to its last token, or all until none waits for its turn any more."""
    source, served = random.Random(1), Served()
    requests = []
    for length in lengths:
        prompt = [source.randrange(3, 100) for _ in range(length.prompt)]
        sampling = SamplingParams(temperature=0, max_tokens=length.output, ignore_eos=True)
        requests.append(core.request(prompt, sampling, lambda *event: None))
        core.add(requests[-1])
    while core.has_work():
        start = time.perf_counter()
        events = core.step()
        served.take(events, time.perf_counter() - start)
        if while_queued and len(served.steps) % 8 == 0 and core.stats().waiting == 0:
            break
    for request in requests:
        core.abort(request)
    while core.has_work():  # steps that were launched ahead
        core.step()
    wanted = sum(length.output for length in lengths)
    if not while_queued and served.tokens != wanted:
        raise RuntimeError(f"{served.tokens} tokens came, {wanted} should have")
    return served
