"""A model whose modules are quantized is the model of the values that they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvant.errors import CorruptModelError
from kvant.formats.weight import PackedWeight
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.select import select_ops
from kvant.quantize.scales.files import read_scales
from kvant.weights.load import load_model, open_source
from kvant.weights.matrices import MatrixReader
from tests.families.configs import TINIES
from tests.families.tiny import build
from tests.support import NATIVE, SingleText, model_logits
from tests.weights.codecs.checkpoints import Make, Pair, llama, quantize
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
        super().__init__()
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


def family(directory: Path, name: str, make: Make, note: dict[str, Any] | None) -> tuple[Pair, list[int]]:
    """The pair of one of the miniatures of the families, and its text."""
    tiny = build(TINIES[name], directory)
    return quantize(Pair(directory / "quantized", tiny.published), make, note), tiny.ids


def with_bias(made: Made, bias: Tensor | None = None) -> Made:
    """The module with a bias: zeros, as an old quantizer writes them for what has none."""
    return made[0] | {"bias": torch.zeros(len(made[1])) if bias is None else bias}, made[1]


def test_qwen_int4(tmp_path: Path) -> None:
    """Qwen-7B-Chat-Int4: fused attention, act-order off, a bias of zeros for all that have none."""

    def make(name: str, rows: int, columns: int) -> Made:
        made = gptq(rows, columns, group=16, zero=7)
        return made if name.endswith("c_attn") else with_bias(made)

    note = GPTQ | {"group_size": 16, "sym": True, "true_sequential": True, "model_name_or_path": None}
    pair, ids = family(tmp_path, "qwen-v1", only(".h.", make), note)
    assert "transformer.h.0.mlp.c_proj.bias" in open_source(pair.quantized).shapes()
    assert torch.equal(model_logits(pair.quantized, ids), model_logits(pair.dense, ids))


def test_internlm2_awq_has_its_rows_put_in_order(tmp_path: Path) -> None:
    make = only(".layers.", lambda _, n, k: awq(n, k, group=16))
    pair, ids = family(tmp_path, "internlm2.5", make, AWQ | {"group_size": 16})
    dense = model_logits(pair.dense, ids)
    assert dense.std() > 0.1
    assert torch.equal(model_logits(pair.quantized, ids), dense)


def test_biases_stand_beside_quantized_weights(tmp_path: Path) -> None:
    make = only(".layers.", lambda _, n, k: gptq(n, k, group=16))
    pair, ids = family(tmp_path, "qwen2-large-biases", make, GPTQ | {"group_size": 16})
    assert torch.equal(model_logits(pair.quantized, ids), model_logits(pair.dense, ids))


@pytest.mark.parametrize("module", ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj", "lm_head"])
def test_a_bias_that_is_not_zero_is_added(tmp_path: Path, module: str) -> None:
    plain = llama(tmp_path / "plain", only("layers", lambda _, n, k: gptq(n, k)), GPTQ, intermediate_size=64)
    tensors = load_file(plain.quantized / "model.safetensors")
    rows = len(open_source(plain.quantized).read(f"{module}.weight", torch.float32))
    found = []
    for bias in (None, torch.zeros(rows), torch.linspace(-1, 1, rows)):
        extra = {} if bias is None else {f"{module}.bias": bias}
        save_file(tensors | extra, plain.quantized / "model.safetensors")
        found.append(model_logits(plain.quantized, IDS))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=0.1)
    if module == "lm_head":
        torch.testing.assert_close(found[2], found[0] + torch.linspace(-1, 1, rows))


def test_a_bias_for_some_of_what_is_fused_must_be_zero(tmp_path: Path) -> None:
    pair = llama(tmp_path, only("layers", lambda _, n, k: gptq(n, k)), GPTQ, intermediate_size=64)
    file = pair.quantized / "model.safetensors"
    expected, tensors = model_logits(pair.quantized, IDS), load_file(file)
    save_file(tensors | {"model.layers.0.self_attn.v_proj.bias": torch.zeros(32)}, file)
    assert torch.equal(model_logits(pair.quantized, IDS), expected)
    save_file(tensors | {"model.layers.0.self_attn.v_proj.bias": torch.ones(32)}, file)
    with pytest.raises(CorruptModelError, match="some projections have a bias"):
        model_logits(pair.quantized, IDS)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_older_checkpoints_have_a_note_of_their_own(tmp_path: Path, name: str) -> None:
    awq_note = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    gptq_note = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False, "static_groups": False}
    make, note = (awq, awq_note) if name == "quant_config.json" else (gptq, gptq_note)
    pair = llama(tmp_path, only("layers", lambda _, n, k: make(n, k)), None, intermediate_size=64)
    (pair.quantized / name).write_text(json.dumps(note))
    assert torch.equal(model_logits(pair.quantized, IDS), model_logits(pair.dense, IDS))


def test_scales_of_a_cache_lie_beside_quantized_weights(tmp_path: Path) -> None:
    note = note_of("pack-quantized", a=W4A16) | {"kv_cache_scheme": CACHE}
    pair = llama(tmp_path, only("layers", lambda _, n, k: compressed(n, k, W4A16)), note, intermediate_size=64)
    file = pair.quantized / "model.safetensors"
    scales = {
        f"model.layers.{layer}.self_attn.{vector}_scale": torch.tensor([0.5 + layer])
        for layer in range(2)
        for vector in "kv"
    }
    save_file(load_file(file) | scales, file)
    assert torch.equal(model_logits(pair.quantized, IDS), model_logits(pair.dense, IDS))
    assert [step.tolist() for step in read_scales(pair.quantized, 2, 2).values] == [[0.5], [1.5]]


def test_inputs_are_rounded_unless_values_alone_are_asked_for(tmp_path: Path) -> None:
    make: Make = only("layers", lambda _, n, k: compressed(n, k, W8A8, packed=False))
    pair = llama(tmp_path, make, note_of("int-quantized", a=W8A8), intermediate_size=64)
    dense, rounded = model_logits(pair.dense, IDS), model_logits(pair.quantized, IDS)
    assert 0.002 < (rounded - dense).norm() / dense.norm() < 0.1
    ops = PackedOps()
    load_model(pair.quantized, dtype="float32", ops=ops)
    assert sum(weight.inputs is not None for weight in ops.seen) == 8
    values = load_model(pair.quantized, dtype="float32", ops=ReferenceOps(), weights="dense")
    assert torch.equal(SingleText(values.decoder, len(IDS), len(IDS)).feed(IDS), dense)


@pytest.mark.parametrize("name", ["awq", "gptq", "w4a16", "w4a16, zero points", "w8a16", "int8 weights"])
def test_memory_is_counted_as_it_is_kept(tmp_path: Path, name: str) -> None:
    make, note = MODELS[name]
    source = open_source(llama(tmp_path, make, note, intermediate_size=64).quantized)
    reader = MatrixReader(source, torch.bfloat16, "auto", packed=True)
    shapes = source.shapes()
    kept = [reader.read(n.removesuffix(".weight"), s) for n, s in shapes.items() if len(s) == 2]
    norms = sum(2 * s[0] for s in shapes.values() if len(s) == 1)
    assert reader.peak_bytes() == sum(weight.nbytes for weight in kept) + norms
    assert MatrixReader(source, torch.bfloat16, "auto", packed=False).peak_bytes() == 2 * source.num_parameters()


def test_a_module_may_lie_in_two_files_and_under_a_prefix(tmp_path: Path) -> None:
    targets = ["re:.*mlp.*", *(f"language_model.model.layers.0.self_attn.{name}_proj" for name in "qkvo")]
    note = note_of("pack-quantized", a=ASYMMETRIC | {"targets": targets[1:]}, b=W8A16 | {"targets": targets[:1]})
    make = only("layers.0", in_two_schemes)
    pair = llama(tmp_path, make, note, intermediate_size=64)
    file = pair.quantized / "model.safetensors"
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(file).items()}
    file.unlink()
    names = sorted(tensors)
    for i in range(2):
        save_file({name: tensors[name] for name in names[i::2]}, pair.quantized / f"model-{i}.safetensors")
    assert torch.equal(model_logits(pair.quantized, IDS), model_logits(pair.dense, IDS))


@pytest.mark.skipif(not NATIVE, reason="no native kernels are built")
@pytest.mark.parametrize("name", ["awq", "gptq, act-order", "gptq of the head too", "w4a16, zero points", "w8a16"])
def test_native_kernels_compute_on_them(tmp_path: Path, name: str) -> None:
    """They round inputs to 8 bits, which moves this model's logits by some percent; a wrong plane, by all of them."""
    torch.manual_seed(0)
    pair = llama(tmp_path, *MODELS[name], intermediate_size=64)
    native = load_model(pair.quantized, dtype="float32", ops=select_ops("cpu", 1)).decoder
    expected = model_logits(pair.dense, IDS)
    assert (SingleText(native, len(IDS), len(IDS)).feed(IDS) - expected).norm() < 0.1 * expected.norm()
