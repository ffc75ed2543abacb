"""Quantized checkpoints mean the values that their layouts are published to mean, and load as dense ones of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from kvant.formats.weight import InputCodes, PackedWeight
from kvant.weights.load import open_source
from tests.engine.checkpoint import CONFIG
from tests.weights.codecs.layouts import Parts, gptq_values
from tests.weights.codecs.random_modules import awq, awq_gemv, compressed, gptq

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = TOKEN | {"strategy": "tensor", "dynamic": False}

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def scheme(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"weights": weights, "input_activations": inputs}


def note_of(layout: str = "pack-quantized", **groups: dict[str, Any]) -> dict[str, Any]:
    named = {name: {"targets": ["Linear"], **group} for name, group in groups.items()}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": named, "ignore": ["lm_head"]}


def decoded(directory: Path, parts: Parts, note: dict[str, Any]) -> PackedWeight:
    """The one module of a checkpoint."""
    save_file({f"m.{name}": part.contiguous() for name, part in parts.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": note}))
    source = open_source(directory)
    assert set(source.shapes()) == {"m.weight"}
    weight = source.packed("m.weight")
    assert weight is not None
    assert source.shapes()["m.weight"] == (weight.out_features, weight.in_features)
    assert source.num_parameters() == weight.out_features * weight.in_features
    assert torch.equal(source.read("m.weight", torch.float32), weight.dequantize(torch.float32))
    return weight


def same(weight: PackedWeight, values: Tensor) -> None:
    assert torch.equal(weight.dequantize(torch.float32), values)


@few
@given(rows=st.integers(1, 4), columns=st.sampled_from([16, 32, 48, 80]), group=st.sampled_from([16, 32, 128]))
def test_awq(tmp_path: Path, rows: int, columns: int, group: int) -> None:
    parts, values = awq(8 * rows, columns, group=group)
    same(decoded(tmp_path, parts, AWQ | {"group_size": group}), values)


@few
@given(rows=st.integers(1, 9), columns=st.sampled_from([32, 64, 96]), group=st.sampled_from([16, 32]))
def test_awq_gemv_pads_its_groups(tmp_path: Path, rows: int, columns: int, group: int) -> None:
    parts, values = awq_gemv(rows, columns, group=group, width=2)
    note = {"w_bit": 4, "q_group_size": group, "zero_point": True, "version": "GEMV", "quant_method": "awq"}
    same(decoded(tmp_path, parts, note), values)


@few
@given(
    rows=st.integers(1, 3),
    columns=st.sampled_from([32, 64, 96]),
    group=st.sampled_from([16, 32, 64, 128]),
    bits=st.sampled_from([4, 8]),
    version=st.sampled_from([1, 2]),
    act_order=st.booleans(),
)
def test_gptq(tmp_path: Path, rows: int, columns: int, group: int, bits: int, version: int, act_order: bool) -> None:
    index = torch.arange(columns) // group
    g_idx = index[torch.randperm(columns)] if act_order else None
    parts, values = gptq(32 * rows, columns, bits=bits, group=group, version=version, g_idx=g_idx)
    note = GPTQ | {"bits": bits, "group_size": group, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    weight = decoded(tmp_path, parts, note)
    same(weight, values)
    assert weight.group_size == min(group, columns) or weight.planes["scale"].data.shape[1] == 1
    assert (weight.order is None) == (g_idx is None or torch.equal(g_idx.sort().values, g_idx))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("claimed", ["gptq", "gptq_v2", None])
@pytest.mark.parametrize("less", [0, 1])
def test_symmetric_gptq_is_what_its_zero_points_say(tmp_path: Path, bits: int, claimed: str | None, less: int) -> None:
    parts, values = gptq(32, 64, bits=bits, version=2 - less, zero=(1 << (bits - 1)) - less)
    note = GPTQ | {"bits": bits, "sym": True} | ({} if claimed is None else {"checkpoint_format": claimed})
    weight = decoded(tmp_path, parts, note)
    assert set(weight.planes) == {"q", "scale"}
    same(weight, values)


def test_a_zero_point_of_0_borrowed_from_its_neighbour(tmp_path: Path) -> None:
    """Version 1 as it comes of version 2 by one subtraction a word."""
    second, _ = gptq(32, 32, version=2)
    second["qzeros"][:] = 0x70000010  # zeros 0, 1, 0, 0, 0, 0, 0, 7
    first = second | {"qzeros": second["qzeros"] - 0x11111111}
    same(decoded(tmp_path, first, GPTQ), gptq_values(second, 4, 2, 32))


@pytest.mark.parametrize("g_idx", [torch.arange(64) // 32, torch.zeros(64), None])
def test_columns_in_order_need_no_order(tmp_path: Path, g_idx: Tensor | None) -> None:
    """Trivial, as it was made, or not there."""
    parts, values = gptq(32, 64, g_idx=torch.arange(64) // 32)
    del parts["g_idx"]
    weight = decoded(tmp_path, parts | ({} if g_idx is None else {"g_idx": g_idx.int()}), GPTQ | {"group_size": -1})
    assert weight.order is None
    same(weight, values)


@few
@given(
    rows=st.sampled_from([9, 16, 20]),
    columns=st.sampled_from([32, 36, 64, 70]),
    bits=st.sampled_from([4, 8]),
    strategy=st.sampled_from(["group", "channel", "tensor"]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_pack_quantized(
    tmp_path: Path, rows: int, columns: int, bits: int, strategy: str, symmetric: bool, dtype: torch.dtype
) -> None:
    if (strategy == "group" and columns % 32) or (strategy == "tensor" and not symmetric):
        return  # the library does not write these
    size = 32 if strategy == "group" else None
    weights = INT4 | {"num_bits": bits, "strategy": strategy, "symmetric": symmetric, "group_size": size}
    parts, values = compressed(rows, columns, scheme(weights), dtype=dtype)
    weight = decoded(tmp_path, parts, note_of(group_0=scheme(weights)))
    same(weight, values)
    assert weight.planes["scale"].data.dtype is dtype
    assert weight.inputs is None


def test_pack_quantized_with_an_order_of_its_groups(tmp_path: Path) -> None:
    parts, values = compressed(8, 64, scheme(INT4))
    shuffled = torch.randperm(64)
    moved = torch.empty_like(values)
    moved[:, shuffled] = values
    codes = torch.empty(8, 64, dtype=torch.int8)
    codes[:, shuffled] = unpack_from_int32(parts["weight_packed"], 4, torch.Size((8, 64)))
    index = torch.empty(64, dtype=torch.int32)
    index[shuffled] = (torch.arange(64) // 32).int()
    parts |= {"weight_packed": pack_to_int32(codes, 4), "weight_g_idx": index}
    weight = decoded(tmp_path, parts, note_of(group_0=scheme(INT4 | {"actorder": "group"})))
    assert weight.order is not None
    same(weight, moved)


@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized"])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("inputs", [None, TOKEN, STATIC])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized(
    tmp_path: Path, layout: str, strategy: str, inputs: dict[str, Any] | None, symmetric: bool
) -> None:
    if strategy == "tensor" and not symmetric:
        return
    weights = INT8 | {"strategy": strategy, "symmetric": symmetric}
    parts, values = compressed(8, 36, scheme(weights, inputs), packed=False, dtype=torch.bfloat16)
    if inputs is STATIC:
        parts["input_scale"] = torch.tensor(0.25, dtype=torch.bfloat16)
        parts["input_zero_point"] = torch.zeros(1, dtype=torch.int8)
    weight = decoded(tmp_path, parts, note_of(layout, group_0=scheme(weights, inputs)))
    same(weight, values)
    if inputs is STATIC:
        assert weight.inputs is not None
        assert weight.inputs.scale is not None
        assert torch.equal(weight.inputs.scale, torch.tensor([0.25]))
    else:
        assert weight.inputs == (None if inputs is None else InputCodes(None))
