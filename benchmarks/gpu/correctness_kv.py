"""The ops on the KV cache against float64, in every format: what is written, and attention over what is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gpu.case import Case
from gpu.checks import compare, distance, verdict
from gpu.correctness import worst_of
from gpu.machine import Machine
from gpu.scenes import Heads, Scene, written_scene
from kvant.formats.kv import KV_FORMATS, SINK_SPAN, KVLayer
from kvant.kernels.ops import AttentionShape
from kvant.kernels.reference import ReferenceOps

Lengths = tuple[tuple[int, int], ...]  # tokens before, and of the step
HEADS = (Heads(32, 8, 128), Heads(8, 8, 128), Heads(14, 2, 64))
DECODES = ((0, 1), (1, 1), (62, 1), (63, 1), (64, 1), (1000, 1), (4095, 1))
MIXED = ((0, 1), (0, 70), (300, 1), (129, 200), (1023, 1))
_SMALL = ((Heads(4, 2, 32), ((0, 1), (70, 1))), (Heads(2, 2, 32), ((0, 1), (3, 5), (70, 1))))


def cases(small: bool) -> list[Case]:
    """Each format: attention, and rotating and writing."""
    found = []
    for name in KV_FORMATS:
        if small and name == "bf16":  # Triton's interpreter cannot multiply it
            continue
        for op, run in (("attention", _attention), ("rope_write_kv", _write)):
            found.append(Case("correctness", {"op": op, "format": name}, partial(run, name), 15))
    return found


def _scenes(machine: Machine) -> Iterator[tuple[Heads, Lengths]]:
    """What each format is tried on."""
    yield from _SMALL if machine.small else ((heads, lengths) for heads in HEADS for lengths in (DECODES, MIXED))


def _attention(name: str, machine: Machine) -> Mapping[str, Any]:
    verdicts = {}
    for heads, lengths in _scenes(machine):
        scene = written_scene(machine, name, heads, lengths)
        q = machine.random(scene.batch.query_starts[-1], heads.queries, heads.dim)
        plain = AttentionShape(heads.queries, heads.kv, heads.dim, heads.dim**-0.5)
        for shape in (plain,) if machine.small else (plain, replace(plain, window=100, softcap=20.0)):
            run = partial(machine.ops.attention, q, scene.cache, scene.batch, shape)
            key = f"{heads.queries}/{heads.kv}/{heads.dim} {len(q)} tokens window {shape.window}"
            verdicts[key] = compare(machine, run, _attended(scene, q, shape), 0.01, 0.1)
    return worst_of(verdicts)


def _attended(scene: Scene, q: Tensor, shape: AttentionShape) -> Tensor:
    """The attention of q over what the cache holds, float64 [T, H, D]."""
    assert scene.store is not None
    layer, out = scene.store.layers[0], torch.empty(q.shape, dtype=torch.float64)
    tables, positions = scene.batch.block_tables.cpu(), scene.batch.positions.cpu()
    group = shape.num_heads // shape.num_kv_heads
    for table, (start, stop), context in zip(
        tables, pairwise(scene.batch.query_starts), scene.batch.context_lens, strict=True
    ):
        keys, values = (layer.read(side, table)[:, :context].double() for side in ("key", "value"))
        keys, values = (x.repeat_interleave(group, dim=0) for x in (keys, values))
        scores = q[start:stop].double().cpu().transpose(0, 1) @ keys.mT * shape.scale
        if shape.softcap is not None:
            scores = (scores / shape.softcap).tanh() * shape.softcap
        distances = positions[start:stop, None] - torch.arange(context)
        hidden = (distances < 0) | (distances >= (shape.window or context + 1))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start:stop] = (weights @ values).transpose(0, 1)
    return out


def _write(name: str, machine: Machine) -> Mapping[str, Any]:
    verdicts = {}
    for heads, lengths in _scenes(machine):
        scene = written_scene(machine, name, heads, lengths)
        label = f"{heads.queries}/{heads.kv}/{heads.dim} {scene.batch.query_starts[-1]} tokens"
        verdicts |= {f"{label} {part}": v for part, v in _written(machine, scene, heads).items()}
    return worst_of(verdicts)


def _written(machine: Machine, scene: Scene, heads: Heads) -> Mapping[str, Mapping[str, Any]]:
    """The rotated queries; keys and values as the cache gives them back, no worse than the reference's."""
    assert scene.store is not None
    tokens = scene.batch.query_starts[-1]
    q, k, v = (machine.random(tokens, count, heads.dim) for count in (heads.queries, heads.kv, heads.kv))
    k = k + 1
    angles = scene.batch.positions.cpu().double()[:, None] * 10000.0 ** -(torch.arange(0, heads.dim, 2) / heads.dim)
    rotary = (angles.cos().float().to(machine.device), angles.sin().float().to(machine.device))

    def run() -> Tensor:
        return machine.ops.rope_write_kv(q, k, v, rotary, scene.cache, scene.batch)

    verdicts = {"queries": compare(machine, run, _rotated(q, *rotary), 0.005, 0.05)}
    device_layer, reference_layer = _back(machine, scene), scene.store.layers[0]
    before = {plane: data.clone() for plane, data in reference_layer.planes.items()}
    host = replace(scene.batch, **{n: getattr(scene.batch, n).cpu() for n in ("positions", "slots", "block_tables")})
    ReferenceOps().rope_write_kv(q.cpu(), k.cpu(), v.cpu(), tuple(r.cpu() for r in rotary), reference_layer, host)
    for side, truth in (("key", _rotated(k, *rotary)), ("value", v.double().cpu())):
        errors = [distance(_step(layer, side, host), truth) for layer in (device_layer, reference_layer)]
        (error, worst), (usual, usual_worst) = errors
        right = error <= 1.05 * usual + 0.004 and worst <= 1.5 * usual_worst + 0.05
        verdicts[side] = verdict(right, error, worst, True)
    verdicts["other slots"] = _untouched(device_layer, before, host)
    return verdicts


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (r.cpu().double().unsqueeze(1) for r in (cos, sin))
    first, second = x.cpu().double().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _back(machine: Machine, scene: Scene) -> KVLayer:
    """The device's layer, on the host, with the host's constants."""
    assert scene.store is not None
    layer = scene.store.layers[0]
    return replace(layer, planes={name: plane.cpu() for name, plane in scene.cache.planes.items()})


def _step(layer: KVLayer, side: str, batch: Any) -> Tensor:
    """What a layer on the host holds of the step's tokens: [T, G, D] float64."""
    pieces = []
    for table, (start, stop), end in zip(
        batch.block_tables, pairwise(batch.query_starts), batch.context_lens, strict=True
    ):
        pieces.append(layer.read(side, table)[:, end - (stop - start) : end])
    return torch.cat(pieces, dim=1).transpose(0, 1).double()


def _untouched(layer: KVLayer, before: Mapping[str, Tensor], batch: Any) -> Mapping[str, Any]:
    """Slots that are not the step's have the bytes that they had."""
    sinks, size = layer.format.sinks, layer.block_size
    first = batch.slots - layer.lead - batch.positions + SINK_SPAN * batch.positions
    spans = (first[batch.positions < sinks].unsqueeze(1) + torch.arange(SINK_SPAN)).flatten()
    slots = torch.cat([batch.slots[batch.positions >= sinks], spans])
    same = True
    for name, plane in layer.planes.items():
        now = plane.clone()
        now[slots // size, :, slots % size] = before[name][slots // size, :, slots % size]
        same &= torch.equal(now.contiguous().view(torch.uint8), before[name].contiguous().view(torch.uint8))
    return verdict(same, 0.0 if same else 1.0, 0.0, True)
