"""Whether the engine is right as a whole: the probabilities of what it says, beside the reference's on the CPU."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gpu.case import Case
from gpu.checks import verdict
from gpu.engine import core_of, model_of
from gpu.lengths import Lengths
from gpu.machine import Machine
from gpu.shapes import check_spec, kv_formats, spec_of
from gpu.weights import UNROUNDED_FORMATS, decoder_weights
from kvant.config import SamplingParams
from kvant.engine.core import Core
from kvant.engine.sequence import Failure
from kvant.kernels.reference import ReferenceOps
from kvant.models.decoder import Decoder

_REQUESTS = (Lengths(1, 24), Lengths(7, 24), Lengths(64, 20), Lengths(100, 9), Lengths(300, 24))
_SMALL = (Lengths(1, 3), Lengths(7, 2))
_CHUNK = 192  # tokens of a step: chunks of prompts with decodes beside them
# Of log-probabilities: roundings to 16 bit, and few codes of a cache that they flip.
_USUAL, _LARGEST = 0.05, 0.5


def cases(small: bool) -> list[Case]:
    """Each KV format, and each weight format with one of them."""
    plain, int8, int4 = kv_formats(small)
    pairs = (("bf16", plain), ("bf16", int8), ("bf16", int4), ("w4", plain), ("w4", int4), ("w8", int8), ("w8a8", int8))
    pairs = (("bf16", plain), ("w4", int4), ("w8a8", int8)) if small else pairs
    return [
        Case("correctness", {"op": "engine", "weights": weights, "kv": kv}, partial(_engine, weights, kv), 40)
        for weights, kv in pairs
    ]


def _engine(weights: str, kv: str, machine: Machine) -> Mapping[str, Any]:
    """Texts decoded together; then the CPU reads them, and says how likely it finds each token."""
    lengths = _SMALL if machine.small else _REQUESTS
    host = replace(machine, device=torch.device("cpu"), ops=ReferenceOps(), kept={})
    source, seed = random.Random(2), torch.seed()
    vocab = _spec(machine).vocab_size
    prompts = [[source.randrange(vocab) for _ in range(length.prompt)] for length in lengths]
    core = _core(machine, host, seed, weights, kv, lengths, max_num_batched_tokens=_CHUNK)
    asks = [SamplingParams(temperature=0, max_tokens=one.output, ignore_eos=True, logprobs=0) for one in lengths]
    requests, found = _serve(core, prompts, asks)
    texts = [prompt + request.sequences[0].output for prompt, request in zip(prompts, requests, strict=True)]
    scored = _core(host, host, seed, weights, kv, [Lengths(one.prompt + one.output, 1) for one in lengths])
    readers, _ = _serve(scored, texts, [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)] * len(texts))
    off = []
    for prompt, request, reader in zip(prompts, requests, readers, strict=True):
        expected = [one.logprob for one in reader.prompt_logprobs[len(prompt) :] if one is not None]
        off += [abs(a - b) for a, b in zip(found[id(request)], expected, strict=True)]
    usual, largest = sum(off) / len(off), max(off)
    return {**verdict(usual <= _USUAL and largest <= _LARGEST, usual, largest, True), "wrong": []}


def _spec(machine: Machine) -> Any:
    return spec_of("llama-2-7b", small=True) if machine.small else check_spec()


def _core(machine: Machine, host: Machine, seed: int, weights: str, kv: str, lengths: Any, **settings: Any) -> Core:
    """An engine on a model that depends on the seed alone, not on the machine.

    Its weights are what 16 bits hold. The reference and products of many tokens round what they expand: with weights
    of 4 bits and an int4 cache, whose codes flip then, that alone moves some log-probability by more than 1.
    """
    torch.manual_seed(seed)
    spec = _spec(machine)
    made, _ = decoder_weights(machine, spec, weights, drawn=host, formats=UNROUNDED_FORMATS)
    return core_of(machine, model_of(machine, Decoder(spec, made, machine.ops)), kv, lengths, **settings)


def _serve(core: Core, prompts: Any, asks: Any) -> tuple[list[Any], dict[int, list[float]]]:
    """The requests when they are done, and the log-probability of each token by request."""
    requests = [core.request(prompt, ask, lambda *event: None) for prompt, ask in zip(prompts, asks, strict=True)]
    for request in requests:
        core.add(request)
    found: dict[int, list[float]] = {id(request): [] for request in requests}
    while core.has_work():
        for request, event in core.step():
            if isinstance(event, Failure):
                raise RuntimeError(f"a request failed: {event.message}")
            if event.logprobs is not None:
                found[id(request)].append(event.logprobs.logprob)
    return requests, found
