"""Scales for a KV cache beside plain weights change nothing; weights quantized in unknown ways are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvant.errors import CorruptModelError, UnsupportedModelError
from kvant.kernels.reference import ReferenceOps
from kvant.quantize.scales.files import read_scales, write_scales
from kvant.quantize.scales.kv_scales import KVScales
from kvant.weights.load import load_model
from tests.engine.checkpoint import CONFIG, write_checkpoint
from tests.support import model_logits

LAYERS, KV_HEADS = CONFIG["num_hidden_layers"], CONFIG["num_key_value_heads"]
IDS = [1, 2, 3, 40, 50]
SCHEME = {"num_bits": 8, "type": "float", "strategy": "attn_head", "dynamic": False, "symmetric": True}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME}
ATTENTION_ONLY = {"attention": {"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8}}}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}


def add_constants(path: Path, *names: str) -> None:
    file = path / "model.safetensors"
    constants = {f"model.layers.{i}.self_attn.{name}": torch.full((1,), 0.5) for i in range(LAYERS) for name in names}
    save_file(load_file(file) | constants, file)


def load(path: Path) -> None:
    load_model(path, dtype="float32", ops=ReferenceOps())


@pytest.mark.parametrize(
    ("config", "note", "names"),
    [
        (COMPRESSED, None, ("k_scale", "v_scale")),
        (COMPRESSED | {"config_groups": ATTENTION_ONLY}, None, ("q_scale", "k_scale", "v_scale", "k_zero_point")),
        (COMPRESSED | {"config_groups": None, "sparsity_config": {}}, None, ("kv_scale",)),
        ({"quant_method": "modelopt", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, None, ("k_proj.k_scale",)),
        ({"quant_method": "modelopt", **MODELOPT}, MODELOPT, ("k_proj.k_scale", "v_proj.v_scale")),
        (None, MODELOPT, ("k_proj.output_scale", "v_proj.output_scale")),
        (None, None, ("k_scale", "v_scale")),
    ],
)
def test_scales_of_the_cache_change_nothing_of_the_weights(tmp_path, config, note, names):
    plain = model_logits(write_checkpoint(tmp_path / "plain"), IDS)
    path = write_checkpoint(tmp_path / "scaled", quantization_config=config)
    add_constants(path, *names)
    if note is not None:
        (path / "hf_quant_config.json").write_text(json.dumps(note))
    assert torch.equal(model_logits(path, IDS), plain)


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt", "vllm"])
def test_scales_written_into_a_checkpoint_are_found_there_and_it_still_loads(tmp_path, layout):
    path = write_checkpoint(tmp_path)
    steps = tuple(torch.tensor([0.5 + layer]) for layer in range(LAYERS))
    write_scales(path, KVScales(steps, steps, "int8"), layout)
    load(path)
    assert [step.tolist() for step in read_scales(path, LAYERS, KV_HEADS).values] == [[0.5], [1.5]]


FP8_WEIGHTS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}
FP8 = {"format": "float-quantized", "config_groups": FP8_WEIGHTS}


@pytest.mark.parametrize(
    ("config", "note", "says"),
    [
        (COMPRESSED | FP8, None, "'float-quantized' is not read; kvant reads .*pack-quantized"),
        (COMPRESSED | FP8 | {"format": "naive-quantized"}, None, "weights of type 'float', 8 bits"),
        (
            COMPRESSED | {"format": "dense", "sparsity_config": {"format": "sparse-bitmask"}},
            None,
            "'dense' is not read",
        ),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, None, "by 'modelopt' are not read; kvant reads awq, gptq"),
        ({"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4"}}, None, "by 'modelopt'"),
        (None, MODELOPT | {"quantization": {"quant_algo": "FP8"}}, "by 'modelopt'"),
        (COMPRESSED, MODELOPT | {"quantization": {"quant_algo": "FP8"}}, "by 'modelopt'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None, "by 'bitsandbytes'"),
        ({"kv_cache_scheme": SCHEME}, None, "by 'unknown'"),
    ],
)
def test_weights_quantized_in_other_ways_are_refused_by_the_name_of_their_method(tmp_path, config, note, says):
    path = write_checkpoint(tmp_path, quantization_config=config)
    if note is not None:
        (path / "hf_quant_config.json").write_text(json.dumps(note))
    with pytest.raises(UnsupportedModelError, match=says):
        load(path)


@pytest.mark.parametrize("config", ["awq", ["awq"], COMPRESSED | {"config_groups": [1]}, MODELOPT | {"producer": "me"}])
def test_a_note_that_is_no_object_is_refused(tmp_path, config: Any):
    with pytest.raises(CorruptModelError, match="must be an object"):
        load(write_checkpoint(tmp_path, quantization_config=config))


def test_other_scales_still_have_no_place(tmp_path):
    path = write_checkpoint(tmp_path)
    add_constants(path, "o_proj.weight_scale")
    with pytest.raises(UnsupportedModelError, match="o_proj.weight_scale' have no place|have no place"):
        load(path)
