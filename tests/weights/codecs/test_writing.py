"""What is written comes back bit for bit, and others read the same values from it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvant.errors import ConfigError, UnsupportedModelError
from kvant.formats.weight import InputCodes, PackedWeight, pair
from kvant.quantize.rtn import rtn
from kvant.weights.codecs.writing import FORMATS, Layout, writer
from kvant.weights.load import open_source
from tests.engine.checkpoint import CONFIG, write_checkpoint
from tests.support import model_logits
from tests.weights.codecs.layouts import Parts, awq_gemm_values, gptq_values

NAME = "model.layers.0.mlp.up_proj"
IDS = [1, 2, 3, 40, 50, 60, 7, 8, 9, 100]


def weight_of(
    rows: int,
    columns: int,
    bits: int = 4,
    group: int = 32,
    *,
    zeros: bool = False,
    dtype: torch.dtype = torch.float16,
    inputs: InputCodes | None = None,
) -> PackedWeight:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.randn(rows, columns // group) * 0.05).to(dtype)
    zero = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8) if zeros else None
    weight = PackedWeight.quantized(bits, pair(codes) if bits == 4 else codes, scale, zero=zero, group_size=group)
    return replace(weight, inputs=inputs)


def store(directory: Path, layout: str, weights: dict[str, PackedWeight]) -> dict[str, Tensor]:
    """Write modules as a checkpoint of nothing else."""
    chosen = writer(layout)
    tensors = {}
    for name, weight in weights.items():
        tensors |= chosen.encode(name, weight)
    note = chosen.config({name: Layout.of(weight) for name, weight in weights.items()}, ["lm_head"])
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": note}))
    return tensors


def assert_same(found: PackedWeight | None, weight: PackedWeight) -> None:
    assert found is not None
    assert (found.format, found.in_features, found.group_size) == (weight.format, weight.in_features, weight.group_size)
    assert found.planes.keys() == weight.planes.keys()
    for name, plane in weight.planes.items():
        assert found.planes[name].data.dtype is plane.data.dtype
        assert torch.equal(found.planes[name].data, plane.data)
    assert found.order is None
    scales = [None if w.inputs is None else w.inputs.scale for w in (found, weight)]
    assert (found.inputs is None) == (weight.inputs is None)
    assert scales[0] is scales[1] is None or torch.equal(*scales)


def parts_of(tensors: dict[str, Tensor], name: str = NAME) -> Parts:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def values_of_others(name: str, parts: Parts, layout: Layout, config: dict[str, Any]) -> Tensor:
    """What the layout is published to mean; compressed-tensors says it itself."""
    if name == "awq":
        return awq_gemm_values(parts, layout.group_size)
    if name == "gptq":
        return gptq_values(parts, layout.bits, 1)
    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    wide = {name: part.float() if name == "weight_scale" else part for name, part in parts.items()}
    return BaseCompressor.get_value_from_registry(parsed.format).decompress(wide, scheme)["weight"].float()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layout=st.sampled_from([*FORMATS]),
    rows=st.integers(1, 4).map(lambda n: 16 * n),
    columns=st.sampled_from([32, 64, 96]),
    group=st.sampled_from([16, 32, 96]),
    bits=st.sampled_from([4, 8]),
    zeros=st.booleans(),
)
def test_round_trip(tmp_path: Path, layout: str, rows: int, columns: int, group: int, bits: int, zeros: bool) -> None:
    assume(columns % group == 0 and (bits == 4 or layout != "awq"))
    weight = weight_of(rows, columns, bits, group, zeros=zeros)
    tensors = store(tmp_path, layout, {NAME: weight})
    source = open_source(tmp_path)
    assert source.shapes() == {f"{NAME}.weight": (rows, columns)}
    assert_same(source.packed(f"{NAME}.weight"), weight)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    others = values_of_others(layout, parts_of(tensors), Layout.of(weight), config)
    assert torch.equal(others, weight.dequantize(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("inputs", [None, InputCodes(), InputCodes(torch.tensor([0.3]))])
def test_compressed_tensors_of_all_dtypes_and_inputs(
    tmp_path: Path, dtype: torch.dtype, inputs: InputCodes | None
) -> None:
    weight = weight_of(7, 36, 8, 36, dtype=dtype, inputs=inputs)
    store(tmp_path, "compressed-tensors", {NAME: weight})
    assert_same(open_source(tmp_path).packed(f"{NAME}.weight"), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_and_rows_that_fill_no_word(tmp_path: Path, bits: int) -> None:
    weight = weight_of(13, 36, bits, 12, zeros=True)
    tensors = store(tmp_path, "compressed-tensors", {NAME: weight})
    assert tensors[f"{NAME}.weight_packed"].shape == (13, -(-36 * bits // 32))
    assert_same(open_source(tmp_path).packed(f"{NAME}.weight"), weight)


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_modules_may_differ(tmp_path: Path, layout: str) -> None:
    weights = {
        "model.layers.0.a": weight_of(16, 64, 4, 32),
        "model.layers.0.b": weight_of(16, 64, 8, 64, zeros=True),
        "model.layers.10.a": weight_of(16, 96, 4, 96),
        "model.layers.1.a": weight_of(16, 96, 4, 32, zeros=True),
        "model.layers.1.b": weight_of(16, 32, 4, 32),
        "lm_head": weight_of(16, 64, 4, 32),
        **{f"model.layers.2.{part}_proj": weight_of(16, 64, 8, 64, zeros=True) for part in "qkv"},
    }
    if layout == "compressed-tensors":
        weights["model.layers.1.c"] = weight_of(16, 96, 8, 96, inputs=InputCodes())
    store(tmp_path, layout, weights)
    source = open_source(tmp_path)
    for name, weight in weights.items():
        assert_same(source.packed(f"{name}.weight"), weight)


def test_a_symmetric_awq_module_has_the_middle_for_zero_points() -> None:
    parts = parts_of(writer("awq").encode(NAME, weight_of(8, 32)))
    assert parts["qzeros"].unique().tolist() == [0x88888888 - (1 << 32)]


def test_gptq_notes() -> None:
    four, eight = Layout(4, 32, True, "none", False), Layout(8, 32, False, "none", False)
    note = writer("gptq").config({"a.0": four, "a.1": eight, "a.2": four}, ["lm_head", "a.3"])
    assert note["dynamic"] == {r"+:a\.1$": {"bits": 8, "group_size": 32, "sym": False}, r"-:a\.3$": {}}
    assert (note["bits"], note["group_size"], note["sym"], note["lm_head"]) == (4, 32, True, False)
    assert "dynamic" not in writer("gptq").config({"a.0": four}, ["lm_head"])
    assert writer("gptq").config({"a": Layout(4, 64, True, "none", True)}, [])["group_size"] == -1


FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "feed_forward.gate_up_proj": ("feed_forward.w1", "feed_forward.w3"),
    "mlp_of_qwen_v1.gate_up_proj": ("mlp_of_qwen_v1.w2", "mlp_of_qwen_v1.w1"),
}
SINGLE = ("self_attn.o_proj", "mlp.down_proj", "feed_forward.w2", "mlp_of_qwen_v1.c_proj")


def noted_bits(note: dict[str, Any], module: str) -> int | None:
    """As GPTQModel finds them for a module, vLLM and SGLang for one of theirs: by the first pattern; None: dense."""
    for pattern, override in note["dynamic"].items():
        if re.match(pattern[2:], module):
            return override["bits"] if pattern.startswith("+:") else None
    return note["bits"]


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("bits", [8, None])
def test_gptq_notes_are_found_under_the_name_of_a_fused_module(fused: str, bits: int | None) -> None:
    four, eight = Layout(4, 32, True, "none", False), Layout(8, 64, False, "none", False)
    modules = [f"layers.{i}.{name}" for i in (1, 11) for name in (*SINGLE, *sum(FUSED.values(), ()))]
    parts = [f"layers.1.{part}" for part in FUSED[fused]]
    layouts = {name: eight if name in parts else four for name in modules if bits or name not in parts}
    note = writer("gptq").config(layouts, ["lm_head", *([] if bits else parts)])
    assert {noted_bits(note, name) for name in (*parts, f"layers.1.{fused}")} == {bits}
    others = {*modules, *(f"layers.{i}.{name}" for i in (1, 11) for name in FUSED)} - {*parts, f"layers.1.{fused}"}
    assert {noted_bits(note, name) for name in others} == {4}


def test_gptq_notes_of_unlike_parts_say_nothing_of_the_fused_module() -> None:
    four, eight = Layout(4, 32, True, "none", False), Layout(8, 64, False, "none", False)
    layouts = {"l.q_proj": eight, "l.k_proj": four, "l.up_proj": four, "l.o_proj": four}
    note = writer("gptq").config(layouts, ["l.v_proj", "l.gate_proj"])
    assert [*note["dynamic"]] == [r"+:l\.q_proj$", r"-:l\.v_proj$", r"-:l\.gate_proj$"]


def test_compressed_tensors_notes_hold_nothing_that_its_config_does_not_know() -> None:
    four, token = Layout(4, 32, True, "none", False), Layout(8, 64, True, "token", True)
    static = replace(token, inputs="static")
    note = writer("compressed-tensors").config({"a": four, "b": token, "c": static}, ["lm_head"])
    assert note["format"] == "mixed-precision"
    assert note.keys() <= QuantizationConfig.model_fields.keys()
    parsed = QuantizationConfig.model_validate(note)
    assert parsed.quantization_status == "compressed"
    schemes = list(parsed.config_groups.values())
    assert [scheme.targets for scheme in schemes] == [["a"], ["b"], ["c"]]
    assert [scheme.format for scheme in schemes] == ["pack-quantized", "int-quantized", "int-quantized"]
    assert isinstance(schemes[0].weights, QuantizationArgs)
    single = writer("compressed-tensors").config({"a": four, "b": four}, ["lm_head"])
    assert single["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "format" not in single["config_groups"]["group_0"]
    assert single["ignore"] == ["lm_head"]


@pytest.mark.parametrize(
    ("layout", "weight", "says"),
    [
        ("awq", weight_of(8, 32, 8), "codes of 8 bits, the format only of 4; use the format compressed-tensors"),
        ("awq", weight_of(12, 32), "12 outputs are no multiple of 8"),
        ("awq", weight_of(8, 32, inputs=InputCodes()), "its inputs are rounded"),
        ("gptq", weight_of(8, 32, inputs=InputCodes()), "its inputs are rounded"),
        ("gptq", weight_of(8, 48, group=16), "48 inputs are no multiple of 32"),
        ("gptq", weight_of(4, 32), "its 4 outputs none of 8"),
        ("awq", weight_of(8, 32, dtype=torch.float32), "scales in torch.float32 have no float16 form"),
        ("gptq", weight_of(8, 32, dtype=torch.float32), "scales in torch.float32 have no float16 form"),
        ("compressed-tensors", weight_of(8, 32, inputs=InputCodes()), "quantize it as w8a8"),
        ("compressed-tensors", weight_of(8, 64, 8, inputs=InputCodes()), "one scale a row"),
        ("compressed-tensors", PackedWeight.dense(torch.ones(8, 32)), "quantize it first"),
        ("compressed-tensors", replace(weight_of(8, 32), order=torch.arange(32)), "without act-order"),
        ("gptq", rtn(torch.randn(8, 64), 4, 32).columns(0, 64).regrouped(16), None),
    ],
)
def test_what_a_format_cannot_hold_is_refused(layout: str, weight: PackedWeight, says: str | None) -> None:
    if says is None:
        writer(layout).encode(NAME, weight)
        return
    with pytest.raises(UnsupportedModelError, match=says):
        writer(layout).encode(NAME, weight)


@pytest.mark.parametrize("layout", FORMATS)
def test_a_smaller_last_group_is_refused(layout: str) -> None:
    scale = torch.ones(8, 2, dtype=torch.float16)
    weight = PackedWeight.quantized(4, torch.zeros(8, 32, dtype=torch.uint8), scale, group_size=48)
    with pytest.raises(UnsupportedModelError, match="its 64 inputs are not whole groups of 48; use a group size"):
        writer(layout).encode(NAME, weight)


def test_awq_has_one_group_size() -> None:
    with pytest.raises(UnsupportedModelError, match="one group size, these modules have 32, 64"):
        writer("awq").config({"a": Layout.of(weight_of(8, 64)), "b": Layout.of(weight_of(8, 128, group=64))}, [])


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="'gguf'; known: compressed-tensors, awq, gptq"):
        writer("gguf")


def quantized_model(directory: Path, layout: str, inputs: InputCodes | None = None) -> tuple[Path, Path]:
    """A miniature Llama in the format, and the dense one of its values."""
    dense = write_checkpoint(directory / "dense", intermediate_size=64)
    tensors, weights = load_file(dense / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.dim() == 2:
            weight = rtn(tensor, 4, 32) if inputs is None else rtn(tensor, 8, tensor.shape[1])
            weights[name.removesuffix(".weight")] = replace(weight, inputs=inputs)
    chosen, quantized, stored = writer(layout), directory / layout, dict(tensors)
    for name, weight in weights.items():
        tensors[f"{name}.weight"] = weight.dequantize(torch.float32)
        del stored[f"{name}.weight"]
        stored |= chosen.encode(name, weight)
    quantized.mkdir()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, quantized / "model.safetensors", metadata={"format": "pt"})
    note = chosen.config({name: Layout.of(weight) for name, weight in weights.items()}, ["lm_head"])
    config = json.loads((dense / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": note}))
    return quantized, dense


@pytest.mark.parametrize("layout", FORMATS)
def test_a_written_model_is_the_model_of_its_values(tmp_path: Path, layout: str) -> None:
    quantized, dense = quantized_model(tmp_path, layout)
    assert torch.equal(model_logits(quantized, IDS), model_logits(dense, IDS))


@pytest.mark.parametrize("inputs", [None, InputCodes(torch.tensor([0.25]))])
def test_transformers_computes_the_same(tmp_path: Path, inputs: InputCodes | None) -> None:
    """With static scales that clip nothing: the library scales tokens to 127.5, and clips at -128."""
    quantized, _ = quantized_model(tmp_path, "compressed-tensors", inputs)
    torch.testing.assert_close(model_logits(quantized, IDS), loaded_by_transformers(quantized)[0], atol=2e-4, rtol=2e-4)


def test_transformers_reads_the_same_weights_of_w8a8(tmp_path: Path) -> None:
    quantized, dense = quantized_model(tmp_path, "compressed-tensors", InputCodes())
    logits, weights = loaded_by_transformers(quantized)
    values = load_file(dense / "model.safetensors")
    assert values.keys() <= weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in values.items())
    ours = model_logits(quantized, IDS)
    assert (logits - ours).norm() < 0.06 * ours.norm()


def loaded_by_transformers(path: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Its logits of `IDS`, and the weights that it computed with."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0], model.state_dict()
