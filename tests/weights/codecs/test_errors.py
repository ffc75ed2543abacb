"""Quantized checkpoints that contradict themselves, or are of a layout that is not read, are refused with the cause."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvant.errors import CorruptModelError, UnsupportedModelError
from kvant.kernels.reference import ReferenceOps
from kvant.weights.load import load_model
from tests.weights.codecs.checkpoints import Make, llama
from tests.weights.codecs.layouts import Parts
from tests.weights.codecs.random_modules import awq, compressed, gptq, words
from tests.weights.codecs.test_models import (
    ASYMMETRIC,
    AWQ,
    GPTQ,
    INT4,
    INT8,
    TOKEN,
    W4A16,
    W8A8,
    note_of,
    only,
)

STATIC = {"weights": INT8, "input_activations": TOKEN | {"strategy": "tensor", "dynamic": False}}
MODULE = "model.layers.1.mlp.up_proj"
METHODS: dict[str, tuple[Make, dict[str, Any]]] = {
    "awq": (lambda _, n, k: awq(n, k), AWQ),
    "gptq": (lambda _, n, k: gptq(n, k, g_idx=torch.arange(k) // 32), GPTQ),
    "packed": (lambda _, n, k: compressed(n, k, ASYMMETRIC), note_of("pack-quantized", a=ASYMMETRIC)),
    "int": (lambda _, n, k: compressed(n, k, W8A8, packed=False), note_of("int-quantized", a=W8A8)),
}

Change = Callable[[Parts], Any]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each method, whole; only this layer's MLP is quantized."""
    directory = tmp_path_factory.mktemp("methods")
    return {
        name: llama(directory / name, only("layers.1.mlp", make), note, intermediate_size=64).quantized
        for name, (make, note) in METHODS.items()
    }


def load(path: Path) -> None:
    load_model(path, dtype="float32", ops=ReferenceOps())


def put(name: str, tensor: torch.Tensor) -> Change:
    return lambda parts: parts.update({name: tensor})


def without(name: str) -> Change:
    return lambda parts: parts.pop(name)


@pytest.mark.parametrize(
    ("method", "change", "says"),
    [
        ("awq", without("scales"), r"model.safetensors: '{}' is quantized, but its tensor '{}.scales' is missing"),
        ("awq", without("qzeros"), "tensor '{}.qzeros' is missing"),
        ("awq", without("qweight"), "tensor '{}.qweight' is missing"),
        ("awq", put("qweight", words(32, 8).long()), r"tensor '{}.qweight' is I64 \[32, 8\], not I32 \[any, any\]"),
        ("awq", put("qweight", words(48, 8)), r"'{}' has 1 scales a row for 48 inputs|has shape \(64, 48\)"),
        ("awq", put("qzeros", words(2, 8)), r"'{}.qzeros' is I32 \[2, 8\], not I32 \[1, 8\]"),
        ("awq", put("scales", torch.ones(1, 65)), r"'{}.scales' is F32 \[1, 65\], not F16 or BF16 or F32 \[any, 64\]"),
        ("awq", put("weight", torch.ones(64, 32)), "'{}.weight' lies beside a quantized form of itself"),
        ("gptq", without("scales"), "tensor '{}.scales' is missing"),
        ("gptq", without("qzeros"), "tensor '{}.qzeros' is missing"),
        ("gptq", without("qweight"), "tensor '{}.qweight' is missing"),
        ("gptq", put("qweight", torch.ones(4, 64)), r"'{}.qweight' is F32 \[4, 64\], not I32 \[any, any\]"),
        ("gptq", put("qzeros", words(1, 9)), "'{}.qzeros' is 9 words wide, which 64 zero points are not in any bits"),
        ("gptq", put("g_idx", torch.full((32,), 3, dtype=torch.int32)), "'{}.g_idx' names group 3 or 3 of 1"),
        ("gptq", put("g_idx", torch.full((32,), -7, dtype=torch.int32)), "'{}.g_idx' names group -7 or -7 of 1"),
        ("gptq", put("g_idx", torch.zeros(31, dtype=torch.int32)), r"'{}.g_idx' is I32 \[31\], not I32 or I64 \[32\]"),
        ("packed", without("weight_scale"), "tensor '{}.weight_scale' is missing"),
        ("packed", without("weight_shape"), "tensor '{}.weight_shape' is missing"),
        ("packed", without("weight_packed"), "tensor '{}.weight' is missing"),
        (
            "packed",
            put("weight_shape", torch.tensor([64, 80])),
            r"'{}.weight_packed' is I32 \[64, 4\], not I32 \[64, 10\]",
        ),
        ("packed", put("weight_scale", torch.ones(64, 3)), "'{}' has 3 scales a row for 32 inputs"),
        ("packed", put("weight_zero_point", words(9, 1)), r"'{}.weight_zero_point' is I32 \[9, 1\], not I32 \[8, 1\]"),
        ("packed", put("weight", torch.ones(64, 32)), "'{}.weight' lies beside a quantized form of itself"),
        ("packed", put("input_scale", torch.ones(1)), "'{}.input_scale' is there, but its config group has no static"),
        ("int", without("weight_scale"), "tensor '{}.weight_scale' is missing"),
        ("int", put("weight_scale", torch.ones(63, 1)), r"'{}.weight_scale' is F32 \[63, 1\], not .* \[64, any\]"),
        (
            "int",
            put("weight", torch.ones(63, 32, dtype=torch.int8)),
            r"has shape \(63, 32\)|not F16 or BF16 or F32 \[63",
        ),
    ],
)
def test_corrupt(checkpoints: dict[str, Path], tmp_path: Path, method: str, change: Change, says: str) -> None:
    load(checkpoints[method])
    tensors = load_file(checkpoints[method] / "model.safetensors")
    parts = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in tensors.items() if name.startswith(MODULE)}
    change(parts)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(MODULE)}
    save_file(rest | {f"{MODULE}.{name}": part for name, part in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoints[method] / "config.json").read_text())
    with pytest.raises(CorruptModelError, match=says.replace("{}", MODULE)):
        load(tmp_path)


def compressed_note(weights: dict[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
    return note_of("int-quantized", a={"weights": INT8 | (weights or {}), "input_activations": {**TOKEN, **inputs}})


@pytest.mark.parametrize(
    ("note", "error", "says"),
    [
        (AWQ | {"version": "gemv_fast"}, UnsupportedModelError, "version 'gemv_fast' .* kvant reads gemm and gemv"),
        (AWQ | {"backend": "llm-awq"}, UnsupportedModelError, "version 'llm-awq'"),
        (AWQ | {"bits": 3}, UnsupportedModelError, "AWQ weights of 3 bits"),
        (GPTQ | {"checkpoint_format": "marlin"}, UnsupportedModelError, "'marlin' are not read; kvant reads gptq and"),
        (GPTQ | {"is_marlin_format": True}, UnsupportedModelError, "GPTQ weights in the format"),
        (GPTQ | {"dynamic": {"+:[": {"bits": 8}}}, CorruptModelError, r"'\[' is no pattern of names"),
        (GPTQ | {"dynamic": {"+:.*": 8}}, CorruptModelError, "must be an object"),
        ({"quant_method": "aqlm"}, UnsupportedModelError, "'aqlm' are not read; kvant reads awq, gptq, compressed"),
        (note_of("nvfp4-pack-quantized", a=W4A16), UnsupportedModelError, "'nvfp4-pack-quantized' is not read; kvant"),
        (note_of("marlin-24", a=W4A16), UnsupportedModelError, "'marlin-24' is not read"),
        (
            note_of("mixed-precision", a=W4A16 | {"format": "float-quantized"}),
            UnsupportedModelError,
            "'float-quantized' is not read",
        ),
        (compressed_note({"num_bits": 6}), UnsupportedModelError, "type 'int', 6 bits"),
        (compressed_note({"strategy": "block"}), UnsupportedModelError, "strategy 'block' are not read"),
        (compressed_note(symmetric=False), UnsupportedModelError, "input_activations .*'symmetric': False.* not read"),
        (compressed_note(type="float"), UnsupportedModelError, "input_activations .* are not read; kvant rounds"),
        (compressed_note(strategy="tensor"), UnsupportedModelError, "input_activations .* are not read"),
        (
            note_of("int-quantized", a=W8A8 | {"output_activations": TOKEN}),
            UnsupportedModelError,
            "output_activations are not read",
        ),
        (
            note_of("pack-quantized", a=W4A16) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            UnsupportedModelError,
            "sparsity_config is not read",
        ),
        (
            note_of("pack-quantized", a=W4A16) | {"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
            UnsupportedModelError,
            "transform_config is not read",
        ),
        (note_of("pack-quantized", a=W4A16 | {"targets": "Linear"}), CorruptModelError, "must be a list of names"),
        (note_of("pack-quantized", a=W4A16 | {"targets": ["re:("]}), CorruptModelError, "is no pattern of names"),
    ],
)
def test_notes(
    checkpoints: dict[str, Path], tmp_path: Path, note: dict[str, Any], error: type[Exception], says: str
) -> None:
    config = json.loads((checkpoints["awq"] / "config.json").read_text()) | {"quantization_config": note}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=says):
        load(tmp_path)


@pytest.mark.parametrize("bits", [2, 3])
def test_gptq_of_fewer_bits(tmp_path: Path, bits: int) -> None:
    parts = {"qweight": words(bits, 64), "qzeros": words(1, 2 * bits), "scales": torch.ones(1, 64)}
    make = only("layers.1.mlp.up", lambda _, n, k: (parts, torch.zeros(n, k)))
    pair = llama(tmp_path, make, GPTQ | {"bits": bits}, intermediate_size=64)
    with pytest.raises(UnsupportedModelError, match=f"'{MODULE}' is quantized by GPTQ in {bits} bits; kvant reads 4"):
        load(pair.quantized)


def test_groups_of_unlike_sizes(tmp_path: Path) -> None:
    make = only("layers.1.mlp.down", lambda _, n, k: gptq(n, k, g_idx=torch.tensor([0] * 24 + [1] * 40 + [2] * 32)))
    with pytest.raises(UnsupportedModelError, match="has groups of 24 to 40 columns; kvant reads groups of one size"):
        load(llama(tmp_path, make, GPTQ, intermediate_size=96).quantized)


def test_inputs_rounded_asymmetrically(tmp_path: Path) -> None:
    def make(_: str, rows: int, columns: int) -> Any:
        parts, values = compressed(rows, columns, STATIC, packed=False)
        return parts | {"input_scale": torch.ones(1), "input_zero_point": torch.ones(1, dtype=torch.int8)}, values

    pair = llama(tmp_path, only("layers.1.mlp.up", make), note_of("int-quantized", a=STATIC), intermediate_size=64)
    with pytest.raises(UnsupportedModelError, match=f"the inputs of '{MODULE}' are rounded asymmetrically"):
        load(pair.quantized)


def test_a_static_scale_must_be_there(tmp_path: Path) -> None:
    make = only("layers.1.mlp.up", lambda _, n, k: compressed(n, k, STATIC, packed=False))
    pair = llama(tmp_path, make, note_of("int-quantized", a=STATIC), intermediate_size=64)
    with pytest.raises(CorruptModelError, match=f"'{MODULE}.input_scale' is missing"):
        load(pair.quantized)


def test_a_module_that_no_group_targets(tmp_path: Path) -> None:
    note = note_of("pack-quantized", a=W4A16 | {"targets": ["x"]}, b={"weights": INT4, "targets": ["re:y"]})
    make = only("layers.1.mlp.up", lambda _, n, k: compressed(n, k, W4A16))
    with pytest.raises(CorruptModelError, match="is of a quantized module that no config group targets"):
        load(llama(tmp_path, make, note, intermediate_size=64).quantized)


def test_parts_that_nobody_knows_are_not_overlooked(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for method, name in (("packed", "weight_global_scale"), ("gptq", "perm"), ("awq", "weight_scale")):
        tensors = load_file(checkpoints[method] / "model.safetensors")
        save_file(tensors | {f"{MODULE}.{name}": torch.ones(1)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((checkpoints[method] / "config.json").read_text())
        with pytest.raises(UnsupportedModelError, match=f"{name}', have no place"):
            load(tmp_path)
