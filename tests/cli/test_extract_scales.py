"""`kvant extract-scales`: what it writes from which checkpoint, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvant.quantize.scales.files import read_scales

LAYER = "model.layers.{}.self_attn."


def checkpoint(path: Path, steps: dict[str, list[float]], **config: object) -> Path:
    """A directory whose two layers both have these constants; its 4-bit weights are of no matter."""
    tensors = {LAYER.format(layer) + name: torch.tensor(step) for layer in (0, 1) for name, step in steps.items()}
    tensors["model.layers.0.mlp.down_proj.qweight"] = torch.zeros(8, dtype=torch.int32)
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    sizes = {"model_type": "mixtral", "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    (path / "config.json").write_text(json.dumps({"architectures": ["MixtralForCausalLM"]} | sizes | config))
    return path


def factors(file: Path) -> dict[str, dict[str, float | list[float]]]:
    document = json.loads(file.read_text())
    assert document["model_type"] == "mixtral"
    assert document["kv_cache"]["dtype"] == "float8_e4m3fn"
    return document["kv_cache"]["scaling_factor"]


@pytest.mark.parametrize(
    "names",
    [("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale"), ("k_proj.output_scale", "v_proj.output_scale")],
)
def test_one_scale_a_layer_is_the_same_for_every_rank(kvant, tmp_path, names):
    model = checkpoint(tmp_path / "model", {name: [0.5] for name in names})
    done = kvant(
        "extract-scales", "--quantized-model", str(model), "--tp-size", "3", "-o", str(tmp_path / "new" / "out")
    )
    assert done.exit_code == 0, done.output
    file = tmp_path / "new" / "out" / "kv_cache_scales.json"
    assert done.stdout == f"{file}\n"
    assert done.stderr == ""
    assert factors(file) == {str(rank): {"0": 0.5, "1": 0.5} for rank in range(3)}


@pytest.mark.parametrize(
    ("tp_size", "parts"),
    [
        (1, [[1.0, 2.0, 3.0, 4.0]]),
        (2, [[1.0, 2.0], [3.0, 4.0]]),
        (8, [[head] for head in (1.0, 2.0, 3.0, 4.0) for _ in "ab"]),
    ],
)
def test_scales_of_heads_are_split(kvant, tmp_path, tp_size, parts):
    steps = [1.0, 2.0, 3.0, 4.0]
    model = checkpoint(tmp_path / "model", {"k_scale": steps, "v_scale": steps})
    assert kvant("extract-scales", "--quantized-model", str(model), "--tp-size", str(tp_size)).exit_code == 0
    assert factors(model / "kv_cache_scales.json") == {str(r): {"0": part, "1": part} for r, part in enumerate(parts)}


def test_ranks_that_the_heads_do_not_divide_over_are_refused(kvant, tmp_path):
    model = checkpoint(tmp_path / "model", {"k_scale": [1.0] * 4, "v_scale": [1.0] * 4})
    done = kvant("extract-scales", "--quantized-model", str(model), "--tp-size", "3")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: 4 KV heads cannot be split over a tensor-parallel size of 3")
    assert not (model / "kv_cache_scales.json").exists()


def test_where_keys_and_values_differ_the_larger_is_written_and_told(kvant, tmp_path):
    model = checkpoint(tmp_path / "model", {"k_scale": [0.5], "v_scale": [2.0]})
    done = kvant("extract-scales", "--quantized-model", str(model))
    assert "different scales in 2 of 2 layers; the file holds one for both, the larger" in done.stderr
    assert factors(model / "kv_cache_scales.json") == {"0": {"0": 2.0, "1": 2.0}}


def test_the_old_spellings_the_output_name_and_an_older_file(kvant, tmp_path):
    model = checkpoint(tmp_path / "model", {"kv_scale": [0.5]})
    (tmp_path / "scales.json").write_text("old")
    flags = (
        "--quantized_model",
        str(model),
        "--tp_size",
        "1",
        "--output_dir",
        str(tmp_path),
        "--output_name",
        "scales.json",
    )
    assert kvant("extract-scales", *flags).exit_code == 0
    assert [step.tolist() for step in read_scales(tmp_path / "scales.json", 2, 4).keys] == [[0.5], [0.5]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: (model / "config.json").unlink(), "holds no config.json"),
        (lambda model: (model / "model.safetensors").unlink(), "holds no static KV scales"),
        (lambda model: (model / "config.json").write_text("{}"), "holds no config.json"),
        (lambda model: (model / "config.json").write_text('{"num_hidden_layers": 2}'), "num_key_value_heads"),
        (
            lambda model: (model / "config.json").write_text('{"n_layer": 3, "n_head": 4}'),
            "layer 2 has no scale for keys",
        ),
    ],
)
def test_a_model_without_scales_is_refused_in_one_line(kvant, tmp_path, change, says):
    model = checkpoint(tmp_path / "model", {"kv_scale": [0.5]})
    change(model)
    done = kvant("extract-scales", "--quantized-model", str(model))
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert not (model / "kv_cache_scales.json").exists()


def test_the_command_line_itself(kvant):
    assert kvant("extract-scales").exit_code == 2
    assert kvant("extract-scales", "--quantized-model", "x", "--tp-size", "0").exit_code == 2
    assert "--output-name" in kvant("extract-scales", "--help").stdout
