"""Attention at the shapes of models: decoding, prompts, and both, in each KV format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from gpu.case import Case
from gpu.machine import Machine
from gpu.scenes import Heads, filled_scene
from gpu.shapes import kv_formats, spec_of
from gpu.timing import rotated
from gpu.workload import Workload, timed
from kvant.formats.kv import KV_FORMATS, KVShape
from kvant.kernels.ops import AttentionShape
from kvant.models.layers import attention_shape

MAIN = kv_formats(small=False)
OTHERS = ("k8v4", "int8_plain", "int4_plain", "int8_pertoken", "int8_pertensor", "fp8_e4m3")


@dataclass(frozen=True)
class Step:
    """A batch: how often a sequence of (tokens before, tokens of the step) comes."""

    name: str
    sequences: tuple[tuple[int, int, int], ...]

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Every sequence's."""
        return [(before, new) for count, before, new in self.sequences for _ in range(count)]


TARGET_MODELS = ("llama-2-7b", "llama-3-8b")
TARGET = Step("decode 64x4096", ((64, 4095, 1),))
DECODES = (
    Step("decode 1x512", ((1, 511, 1),)),
    Step("decode 1x4096", ((1, 4095, 1),)),
    Step("decode 1x32768", ((1, 32767, 1),)),
    Step("decode 16x1024", ((16, 1023, 1),)),
    Step("decode 128x1024", ((128, 1023, 1),)),
)
PROMPTS = (
    Step("prompt 4096", ((1, 0, 4096),)),
    Step("chunk 512 after 4096", ((1, 4096, 512),)),
    Step("63 decodes and a chunk", ((63, 1023, 1), (1, 1024, 512))),
)
_SMALL = (Step("decode 64x4096", ((2, 69, 1),)), Step("prompt 4096", ((1, 3, 6),)))


def cases(small: bool) -> list[Case]:
    """The targets' first, then other formats, batches and models."""
    found = []
    for model, fmt, step in _points(small):
        tags = {"model": model, "format": fmt, "step": step.name}
        target = step == TARGET and model in TARGET_MODELS and fmt in MAIN
        found.append(Case("attention", tags, partial(timed, partial(build, model, fmt, step)), 12, target=target))
    return found


def _points(small: bool) -> Iterator[tuple[str, str, Step]]:
    if small:
        yield from (("llama-2-7b", f, step) for f in kv_formats(small) for step in _SMALL)
        return
    models = TARGET_MODELS
    yield from ((model, f, TARGET) for model in models for f in MAIN)
    yield from ((model, f, step) for step in DECODES for model in models for f in MAIN)
    yield from ((model, f, step) for step in PROMPTS for model in models for f in MAIN)
    yield from ((model, f, TARGET) for f in OTHERS for model in models)
    yield from (("llama-2-13b", f, TARGET) for f in MAIN)


def build(model: str, fmt: str, step: Step, machine: Machine) -> Workload:
    """One layer's attention."""
    spec = spec_of(model, machine.small)
    heads, shape = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim), attention_shape(spec, spec.layers[0])
    one_layer = KVShape(1, heads.kv, heads.dim)
    lengths = step.lengths
    tokens, context = sum(new for _, new in lengths), sum(before + new for before, new in lengths)
    kv_bytes = context * KV_FORMATS[fmt].bytes_per_token(one_layer)
    scenes = rotated(machine, filled_scene(machine, fmt, heads, lengths), kv_bytes)
    q = machine.random(tokens, heads.queries, heads.dim)
    calls = [partial(machine.ops.attention, q, scene.cache, scene.batch, shape) for scene in scenes]
    return Workload(calls, kv_bytes + 2 * q.nbytes, _flops(lengths, shape))


def _flops(lengths: Sequence[tuple[int, int]], shape: AttentionShape) -> int:
    """Of q k^T and the sum of values, over the pairs that causality leaves."""
    pairs = sum(new * before + new * (new + 1) // 2 for before, new in lengths)
    return 4 * pairs * shape.num_heads * shape.head_dim


def write_cases(small: bool) -> list[Case]:
    """Rotating and writing, in each format."""
    formats = kv_formats(small) if small else (*MAIN, *OTHERS)
    return [
        Case(
            "small",
            {"op": "rope_write_kv", "model": "llama-2-7b", "format": fmt, "tokens": tokens},
            partial(timed, partial(build_write, fmt, tokens)),
            8,
        )
        for fmt in formats
        for tokens in ((2,) if small else (1, 64, 2048))
    ]


def build_write(fmt: str, tokens: int, machine: Machine) -> Workload:
    """So many sequences' next token, or a prompt where there are many."""
    spec = spec_of("llama-2-7b", machine.small)
    heads = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    lengths = [(100, 1)] * tokens if tokens <= 64 else [(100, tokens)]
    scene = filled_scene(machine, fmt, heads, lengths)
    sizes = (heads.queries, heads.kv, heads.kv)
    rotary = tuple(machine.random(tokens, heads.dim // 2, dtype=torch.float32) for _ in range(2))
    vectors = [machine.random(tokens, size, heads.dim) for size in sizes]
    size = sum(x.nbytes for x in vectors)
    calls = [
        partial(machine.ops.rope_write_kv, *copies, rotary, scene.cache, scene.batch)
        for copies in rotated(machine, vectors, size)
    ]
    written = tokens * KV_FORMATS[fmt].bytes_per_token(KVShape(1, heads.kv, heads.dim))
    return Workload(calls, size + vectors[0].nbytes + written)
