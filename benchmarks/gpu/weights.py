"""Random weights: matrices in each format, and whole decoders, made on the device layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from gpu.machine import Machine
from gpu.shapes import linear_shapes
from kvant.formats.weight import InputCodes, PackedWeight
from kvant.models.layers import AttentionWeights, DecoderWeights, LayerWeights, Linear, MlpWeights
from kvant.models.spec import ModelSpec


@dataclass(frozen=True)
class WeightFormat:
    """How matrices are stored; `bits` 16 is bfloat16. `group` 0 is one scale a row.

    Scales in `octaves` are powers of two: 16 bits hold such weights, and who expands them first rounds nothing.
    """

    bits: int
    group: int = 128
    zeros: bool = False
    inputs: bool = False
    octaves: bool = False

    @property
    def rate(self) -> str:
        """The ceiling of its products."""
        return "int8" if self.inputs else "bf16"


WEIGHT_FORMATS: Mapping[str, WeightFormat] = {
    "bf16": WeightFormat(16),
    "w4": WeightFormat(4, zeros=True),
    "w8": WeightFormat(8),
    "w8a8": WeightFormat(8, group=0, inputs=True),
}
UNROUNDED_FORMATS: Mapping[str, WeightFormat] = {
    name: replace(fmt, octaves=True) for name, fmt in WEIGHT_FORMATS.items()
}
_UNIFORM = 12**-0.5  # the standard deviation of a uniform distribution, of its width


def packed(machine: Machine, fmt: WeightFormat, n: int, k: int) -> PackedWeight:
    """A matrix [n, k] whose products with normally distributed inputs are about as large as these."""
    if fmt.bits == 16:
        return PackedWeight.dense(machine.random(n, k) * k**-0.5)
    group = min(fmt.group or k, k)
    size = (k**-0.5) / (_UNIFORM * 2**fmt.bits)
    scale = (1 + 0.1 * machine.random(n, -(-k // group), dtype=torch.float32)) * size
    if fmt.octaves:  # several, or a scale of another group would do as well
        scale = (scale.log2().round() + machine.random_bytes(*scale.shape) % 3 - 1).exp2()
    zero = machine.random_bytes(*scale.shape) % 3 + (2 ** (fmt.bits - 1) - 1) if fmt.zeros else None
    weight = PackedWeight.quantized(
        fmt.bits, machine.random_bytes(n, k * fmt.bits // 8), scale.half(), zero=zero, group_size=group
    )
    return replace(weight, inputs=InputCodes()) if fmt.inputs else weight


def decoder_weights(
    machine: Machine,
    spec: ModelSpec,
    body: str,
    head: str = "bf16",
    drawn: Machine | None = None,
    formats: Mapping[str, WeightFormat] = WEIGHT_FORMATS,
) -> tuple[DecoderWeights, int]:
    """A decoder with its layers in one format and its head in another, the embedding in 16 bit; and its bytes.

    Args:
        machine: where it is to run.
        spec: its shapes.
        body: the format of its layers, one of `formats`.
        head: that of its head.
        drawn: where its numbers are drawn, if not there.
        formats: how a format's matrices are made.
    """
    shapes = {shape.name: shape for shape in linear_shapes(spec)}
    source, total = drawn or machine, 0

    def linear(name: str, fmt: str, bias: bool = False) -> Linear:
        nonlocal total
        weight = packed(source, formats[fmt], shapes[name].n, shapes[name].k)
        total += weight.nbytes
        added = (source.random(shapes[name].n) * 0.1).to(machine.device) if bias else None
        return Linear(machine.ops.prepare(weight), added)

    def norm() -> torch.Tensor:
        return (1 + 0.1 * source.random(spec.hidden_size, dtype=torch.float32)).to(machine.device)

    def layer() -> LayerWeights:
        attention = AttentionWeights(linear("qkv", body, bias=spec.family == "qwen"), linear("out", body))
        return LayerWeights(norm(), attention, norm(), MlpWeights(linear("gate_up", body), linear("down", body)))

    embedding = PackedWeight.dense(source.random(spec.vocab_size, spec.hidden_size))
    total += embedding.nbytes
    layers = tuple(layer() for _ in spec.layers)
    weights = DecoderWeights(machine.ops.prepare(embedding), layers, norm(), linear("head", head))
    return weights, total
