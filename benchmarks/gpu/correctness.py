"""The ops without a cache against float64: products in every weight format, norms, activations, embedding, sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.case import Case
from gpu.checks import compare, verdict
from gpu.machine import Machine
from gpu.shapes import linear_shapes, spec_of
from gpu.weights import WEIGHT_FORMATS, WeightFormat, packed
from kvant.formats.weight import PackedWeight
from kvant.kernels.ops import SamplingBatch
from kvant.kernels.reference import ReferenceOps, rounded_inputs

# Two roundings to bfloat16 are 0.003 on average; 8-bit codes of inputs may round a few values the other way.
WHOLE, ELEMENT = 0.008, 0.06
# name: bits, group, what stands beside the scales, columns in another order
VARIANTS: Mapping[str, tuple[int, int, str, bool]] = {
    "int4_g32": (4, 32, "", False),
    "int4_g64_bias": (4, 64, "bias", False),
    "int4_g128_order": (4, 128, "zero", True),
    "int8_g32_bias": (8, 32, "bias", False),
    "int8_row_zero": (8, 0, "zero", False),
}


def cases(small: bool) -> list[Case]:
    """Every format at the shapes of two models; every variant of a format at one."""
    found = list(_linear_cases(small))
    for op, run in (("norms", _norms), ("gated", _gated), ("embedding", _embedding), ("sample", _sample)):
        found.append(Case("correctness", {"op": op}, run, 20))
    return found


def _linear_cases(small: bool) -> Iterator[Case]:
    rows = (1, 5) if small else (1, 3, 16, 17, 64, 200)
    for model in ("llama-2-7b",) if small else ("llama-2-7b", "llama-3-8b"):
        shapes = linear_shapes(spec_of(model, small))
        for name in WEIGHT_FORMATS:
            for shape in shapes[:1] if small else shapes[:4]:
                tags = {"op": "linear", "model": model, "layer": shape.name, "format": name}
                yield Case("correctness", tags, partial(_linear, name, shape.n, shape.k, rows), 20)
    for name in VARIANTS:
        run = partial(_linear, name, 96 if small else 4096, 128 if small else 4096, rows)
        yield Case("correctness", {"op": "linear", "variant": name}, run, 20)


def _variant(machine: Machine, name: str, n: int, k: int) -> PackedWeight:
    bits, group, beside, disorder = VARIANTS[name]
    weight = packed(machine, WeightFormat(bits, group, zeros=beside == "zero"), n, k)
    scale = weight.planes["scale"].data
    if beside == "bias":
        middle = -(2 ** (bits - 1)) + machine.random(*scale.shape, dtype=torch.float32)
        q = weight.planes["q"].data
        weight = PackedWeight.quantized(bits, q, scale, (middle * scale.float()).half(), group_size=weight.group_size)
    return replace(weight, order=torch.randperm(k, device=machine.device)) if disorder else weight


def on_host(weight: PackedWeight) -> PackedWeight:
    """The same weight in the host's memory."""
    planes = {name: replace(plane, data=plane.data.cpu()) for name, plane in weight.planes.items()}
    return replace(weight, planes=planes, order=None if weight.order is None else weight.order.cpu())


def _linear(name: str, n: int, k: int, rows: tuple[int, ...], machine: Machine) -> Mapping[str, Any]:
    """The worst of several numbers of rows, with a bias on every other."""
    known = name in WEIGHT_FORMATS
    weight = packed(machine, WEIGHT_FORMATS[name], n, k) if known else _variant(machine, name, n, k)
    prepared = machine.ops.prepare(weight)
    matrix = on_host(weight).dequantize(torch.float32).to(machine.device).double()
    verdicts = {}
    for index, count in enumerate(rows):
        x, bias = machine.random(count, k), machine.random(n) if index % 2 else None
        seen = x if weight.inputs is None else rounded_inputs(x.float(), weight.inputs)
        truth = seen.double() @ matrix.T + (0.0 if bias is None else bias.double())
        verdicts[count] = compare(machine, partial(machine.ops.linear, x, prepared, bias), truth, WHOLE, ELEMENT)
    return worst_of(verdicts)


def worst_of(verdicts: Mapping[Any, Mapping[str, Any]]) -> Mapping[str, Any]:
    """One verdict for several, and which of them are wrong."""
    whole = verdict(
        all(v["right"] for v in verdicts.values()),
        max(v["error"] for v in verdicts.values()),
        max(v["worst"] for v in verdicts.values()),
        all(v["repeatable"] for v in verdicts.values()),
    )
    return {**whole, "wrong": [str(key) for key, v in verdicts.items() if not v["right"]]}


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


def _norms(machine: Machine) -> Mapping[str, Any]:
    ops, verdicts = machine.ops, {}
    for rows, width in ((3, 128),) if machine.small else ((1, 4096), (7, 5120), (500, 4096), (64 * 32, 128)):
        x, residual = machine.random(rows, width) * 3, machine.random(rows, width)
        weight, total = 1 + machine.random(width, dtype=torch.float32), x + residual
        runs = {
            "rms_norm": (partial(ops.rms_norm, x, weight, 1e-5), _normed(x, weight)),
            "add_rms_norm": (
                lambda x=x, r=residual, w=weight: ops.add_rms_norm(x, r, w, 1e-5)[0],
                _normed(total, weight),
            ),
            "residual": (lambda x=x, r=residual, w=weight: ops.add_rms_norm(x, r, w, 1e-5)[1], total),
        }
        for name, (run, truth) in runs.items():
            verdicts[f"{name} {rows}x{width}"] = compare(machine, run, truth, 0.005, 0.1)
    return worst_of(verdicts)


def _gated(machine: Machine) -> Mapping[str, Any]:
    functions = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    }
    verdicts = {}
    for rows, width in ((3, 64),) if machine.small else ((1, 11008), (130, 14336)):
        x = machine.random(rows, 2 * width) * 3
        gate, up = x.double().chunk(2, dim=-1)
        for name, function in functions.items():
            truth = function(gate) * up
            verdicts[f"{name} {rows}"] = compare(machine, partial(machine.ops.gated, x, name), truth, 0.006, 0.4)
    return worst_of(verdicts)


def _embedding(machine: Machine) -> Mapping[str, Any]:
    n, k = (50, 64) if machine.small else (32000, 4096)
    ids, verdicts = torch.randint(0, n, (37,), device=machine.device), {}
    for name in ("bf16", "w4", "w8"):
        weight = packed(machine, WEIGHT_FORMATS[name], n, k)
        truth = on_host(weight).dequantize(torch.float32)[ids.cpu()]
        run = partial(machine.ops.embedding, ids, machine.ops.prepare(weight))
        verdicts[name] = compare(machine, run, truth, 0.001, 0.01)
    return worst_of(verdicts)


def _sample(machine: Machine) -> Mapping[str, Any]:
    """The tokens are the reference's; where they are not, a draw nearby gives them."""
    rows, vocab = (24, 50) if machine.small else (64, 128256)
    logits = 3 * torch.randn(rows, vocab)
    cycle = torch.arange(rows)
    params = SamplingBatch(
        temperature=torch.tensor([0.0, 0.7, 1.0])[cycle % 3],
        top_k=torch.tensor([0, 40])[cycle % 2],
        top_p=torch.tensor([1.0, 0.9, 0.9, 0.4])[cycle % 4],
        min_p=torch.tensor([0.0, 0.0, 0.0, 0.0, 0.05])[cycle % 5],
        uniform=torch.rand(rows, dtype=torch.float64),
    )
    device_logits = logits.to(machine.device)
    found = [machine.ops.sample(device_logits, params).cpu() for _ in range(3)]
    nearby = [
        ReferenceOps().sample(logits, replace(params, uniform=(params.uniform + off).clamp(0, 1 - 1e-9)))
        for off in (-1e-5, 0.0, 1e-5)
    ]
    wrong = 1 - torch.stack([found[0] == tokens for tokens in nearby]).any(0).double().mean()
    same = all(torch.equal(found[0], other) for other in found)
    return {**verdict(wrong == 0, float(wrong), float(wrong), same), "wrong": []}
