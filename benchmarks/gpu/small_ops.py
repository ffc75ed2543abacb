"""The ops that move little: norms, activations, sampling. At batch 1 it is their launches that count."""

from __future__ import annotations

from functools import partial

import torch

from gpu import attention
from gpu.case import Case
from gpu.machine import Machine
from gpu.shapes import spec_of
from gpu.timing import rotated
from gpu.workload import Build, Workload, timed
from kvant.kernels.ops import SamplingBatch


def cases(small: bool) -> list[Case]:
    """At one model's widths, for few rows and many; sampling over the largest vocabularies."""
    rows = (2,) if small else (1, 64, 2048)
    found = [_case(op, count, partial(build, count)) for op, build in _BUILDS for count in rows]
    kinds = ("greedy", "top_p")
    for model in ("llama-2-7b",) if small else ("llama-2-7b", "qwen-7b"):
        for kind in kinds:
            for count in (2,) if small else (1, 64):
                build = partial(_sample, model, kind == "greedy", count)
                found.append(_case(f"sample {kind} {model}", count, build))
    return found + attention.write_cases(small)


def _case(op: str, tokens: int, build: Build) -> Case:
    return Case("small", {"op": op, "tokens": tokens}, partial(timed, build), 6)


def _add_rms_norm(tokens: int, machine: Machine) -> Workload:
    width = spec_of("llama-2-7b", machine.small).hidden_size
    weight = 1 + machine.random(width, dtype=torch.float32)
    pair = [machine.random(tokens, width) for _ in range(2)]
    size = 2 * pair[0].nbytes
    calls = [partial(machine.ops.add_rms_norm, *p, weight, 1e-5) for p in rotated(machine, pair, size)]
    return Workload(calls, 2 * size)


def _gated(tokens: int, machine: Machine) -> Workload:
    x = machine.random(tokens, 2 * spec_of("llama-2-7b", machine.small).intermediate_size)
    calls = [partial(machine.ops.gated, copy, "silu") for copy in rotated(machine, x, x.nbytes)]
    return Workload(calls, x.nbytes * 3 // 2)


_BUILDS = (("add_rms_norm", _add_rms_norm), ("gated", _gated))


def _sample(model: str, greedy: bool, rows: int, machine: Machine) -> Workload:
    logits = machine.random(rows, spec_of(model, machine.small).vocab_size, dtype=torch.float32) * 3

    def every(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device=machine.device)

    params = SamplingBatch(
        temperature=every(0.0 if greedy else 0.8, torch.float32),
        top_k=every(0, torch.int64),
        top_p=every(1.0 if greedy else 0.9, torch.float32),
        min_p=every(0.0, torch.float32),
        uniform=torch.rand(rows, dtype=torch.float64, device=machine.device),
    )
    calls = [partial(machine.ops.sample, copy, params) for copy in rotated(machine, logits, logits.nbytes)]
    return Workload(calls, logits.nbytes)
