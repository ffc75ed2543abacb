"""A model whose modules are quantized is the model of the values that they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvant.formats.weight import PackedWeight
from kvant.kernels.reference import ReferenceOps
from kvant.weights.load import load_model, open_source
from tests.support import SingleText, model_logits
from tests.weights.codecs.checkpoints import Make, llama
from tests.weights.codecs.random_modules import Made, awq, compressed, gptq

IDS = [1, 2, 3, 40, 50, 60, 7, 8, 9, 100]
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
W4A16 = {"weights": INT4, "input_activations": None}
ASYMMETRIC = {"weights": INT4 | {"symmetric": False}, "input_activations": None}
W8A16 = {"weights": INT8, "input_activations": None}
W8A8 = {"weights": INT8, "input_activations": TOKEN}
CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


class PackedOps(ReferenceOps):
    """The reference, on quantized weights as they are; it notes the weights that it gets."""

    packed_weights = True

    def __init__(self) -> None:
        self.seen: list[PackedWeight] = []

    def prepare(self, weight: PackedWeight) -> Any:
        self.seen.append(weight)
        return super().prepare(weight)


def only(pattern: str, make: Make) -> Make:
    """`make` for these modules; others stay dense."""
    return lambda name, rows, columns: make(name, rows, columns) if pattern in name else None


def act_ordered(name: str, rows: int, columns: int) -> Made:
    """Projections of the same inputs have the same order, as they do where it comes from these inputs."""
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    return gptq(rows, columns, g_idx=(torch.arange(columns) // 32)[order])


def orders_of_their_own(name: str, rows: int, columns: int) -> Made:
    return gptq(rows, columns, g_idx=(torch.arange(columns) // 32)[torch.randperm(columns)])


def note_of(layout: str, **groups: dict[str, Any]) -> dict[str, Any]:
    named = {name: {"targets": ["Linear"], **group} for name, group in groups.items()}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": named, "ignore": ["lm_head"]}


def in_two_schemes(name: str, rows: int, columns: int) -> Made:
    return compressed(rows, columns, W8A16 if "mlp" in name else ASYMMETRIC)


TWO_SCHEMES = note_of("pack-quantized", a=ASYMMETRIC, b=W8A16 | {"targets": ["re:.*mlp.*"]})
MODELS: dict[str, tuple[Make, dict[str, Any]]] = {
    "awq": (only("layers", lambda _, n, k: awq(n, k)), AWQ),
    "gptq": (only("layers", lambda _, n, k: gptq(n, k)), GPTQ),
    "gptq, act-order": (only("layers", act_ordered), GPTQ | {"desc_act": True}),
    "gptq, orders that differ": (only("layers", orders_of_their_own), GPTQ | {"desc_act": True}),
    "gptq v2, 8 bits": (only("layers", lambda _, n, k: gptq(n, k, bits=8, version=2)), GPTQ | {"format": "gptq_v2"}),
    "gptq of some": (only("mlp", lambda _, n, k: gptq(n, k)), GPTQ | {"dynamic": {"-:.*self_attn.*": {}}}),
    "gptq of one of three": (only("1.self_attn.q_proj", lambda _, n, k: gptq(n, k)), GPTQ),
    "gptq of the head too": (lambda _, n, k: gptq(n, k), GPTQ | {"lm_head": True}),
    "w4a16": (only("layers", lambda _, n, k: compressed(n, k, W4A16)), note_of("pack-quantized", a=W4A16)),
    "w4a16, zero points": (
        only("layers", lambda _, n, k: compressed(n, k, ASYMMETRIC)),
        note_of("pack-quantized", a=ASYMMETRIC),
    ),
    "w8a16": (only("layers", lambda _, n, k: compressed(n, k, W8A16)), note_of("pack-quantized", a=W8A16)),
    "two schemes": (only("layers", in_two_schemes), TWO_SCHEMES),
    "int8 weights": (
        only("layers", lambda _, n, k: compressed(n, k, W8A16, packed=False)),
        note_of("int-quantized", a=W8A16),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_quantized_model_is_the_model_of_its_values(tmp_path: Path, name: str) -> None:
    make, note = MODELS[name]
    torch.manual_seed(0)
    pair = llama(tmp_path, make, note, intermediate_size=64)
    dense = model_logits(pair.dense, IDS)
    assert dense.std() > 0.1
    assert torch.equal(model_logits(pair.quantized, IDS), dense)
    ops = PackedOps()
    kept = load_model(pair.quantized, dtype="float32", ops=ops)
    assert torch.equal(SingleText(kept.decoder, len(IDS), len(IDS)).feed(IDS), dense)
    # Fused with dense ones, a matrix is dense.
    assert name == "gptq of one of three" or any(weight.format != "dense" for weight in ops.seen)
    source = open_source(pair.quantized)
    assert source.num_parameters() == open_source(pair.dense).num_parameters()
