"""Static KV scales in files: each layout read from files written here by hand, and what is written read again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvant.errors import ConfigError, CorruptModelError, UnsupportedModelError
from kvant.quantize.scales.files import cache_sizes, read_scales, write_scales
from kvant.quantize.scales.kv_scales import KVScales
from kvant.quantize.scales.tensors import scale_tensors

ATTENTION = "model.layers.{}.self_attn."
TENSOR_LAYOUTS = ("compressed-tensors", "modelopt", "output-scale", "fused")


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def param_file(path: Path, factors: Any, **document: Any) -> Path:
    file = path / "kv_cache_scales.json"
    cache = {"dtype": "float8_e4m3fn", "scaling_factor": factors}
    file.write_text(json.dumps({"model_type": "llama", "kv_cache": cache} | document))
    return file


def tensor_file(path: Path, layers: list[dict[str, Tensor]], name: str = "model.safetensors", prefix: str = "") -> None:
    """A checkpoint's file with these constants of each layer's attention, and a weight that is no float."""
    tensors = {
        f"{prefix}{ATTENTION.format(index)}{key}": tensor.clone()
        for index, layer in enumerate(layers)
        for key, tensor in layer.items()
    }
    tensors[f"{prefix}model.layers.0.mlp.down_proj.weight_packed"] = torch.zeros(4, dtype=torch.int32)
    save_file(tensors, path / name)


def numbers(steps: tuple[Tensor, ...]) -> list[list[float]]:
    assert all(step.dtype == torch.float32 for step in steps)
    return [step.tolist() for step in steps]


# ---- kv_cache_scales.json


def test_one_rank_with_a_number_for_each_layer(tmp_path):
    read = read_scales(param_file(tmp_path, {"0": {"0": 0.5, "1": 2}}), 2, 4)
    assert numbers(read.keys) == numbers(read.values) == [[0.5], [2.0]]
    assert read.codes is None


def test_the_oldest_files_name_ranks_in_words_and_any_dtype_is_read(tmp_path):
    cache = {"dtype": "int8", "scaling_factor": {"rank0": {"1": 0.25, "0": 0.5}}}
    assert numbers(read_scales(param_file(tmp_path, {}, kv_cache=cache), 2, 4).keys) == [[0.5], [0.25]]


@pytest.mark.parametrize(
    ("factors", "heads", "expected"),
    [
        ({"0": {"0": [1.0, 2.0, 3.0, 4.0]}}, 4, [1.0, 2.0, 3.0, 4.0]),
        ({"1": {"0": [3.0, 4.0]}, "0": {"0": [1.0, 2.0]}}, 4, [1.0, 2.0, 3.0, 4.0]),
        ({"0": {"0": 0.5}, "1": {"0": 0.5}}, 4, [0.5]),
        ({"0": {"0": 0.5}, "1": {"0": 0.25}}, 4, [0.5, 0.5, 0.25, 0.25]),
        ({"0": {"0": 0.5}, "1": {"0": [3.0, 4.0]}}, 4, [0.5, 0.5, 3.0, 4.0]),
        ({"0": {"0": [1.0]}, "1": {"0": [1.0]}, "2": {"0": [2.0]}, "3": {"0": [2.0]}}, 2, [1.0, 2.0]),
        ({"0": {"0": [7.0]}}, 1, [7.0]),
    ],
)
def test_every_rank_speaks_for_its_own_heads(tmp_path, factors, heads, expected):
    read = read_scales(param_file(tmp_path, factors), 1, heads)
    assert numbers(read.keys) == numbers(read.values) == [expected]


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({}, "is no file of KV scales"),
        ([0.5], "is no file of KV scales"),
        ({"0": [0.5, 0.5]}, "rank 0 must be an object with one entry for each layer"),
        ({"0": {"0": 1.0}}, "rank 0 has scales for 1 layers, the model has 2"),
        ({"0": {"0": 1.0, "1": 1.0, "2": 1.0}}, "rank 0 has scales for 3 layers, the model has 2"),
        ({"0": {"0": 1.0, "2": 1.0}}, "rank 0 has no entry for layer 1"),
        ({"0": {"0": 1.0, "00": 1.0}}, "'00' is no number of a layer"),
        ({"0": {"0": 1.0, "rank0": 1.0}}, "rank 0 has no entry for layer 1"),
        ({"0": {}}, "rank 0 has no entry for layer 0"),
        ({"1": {"0": 1.0, "1": 1.0}}, "scaling_factor has no entry for tensor-parallel rank 0"),
        ({"one": {"0": 1.0, "1": 1.0}}, "'one' is no number of a tensor-parallel rank"),
        ({"0": {"0": 1.0, "1": 1.0}, "1": {"0": 1.0}}, "rank 1 has scales for 1 layers"),
        ({"0": {"0": 1.0, "1": "1.0"}}, "layer 1: '1.0' is no scale"),
        ({"0": {"0": 1.0, "1": True}}, "layer 1: True is no scale"),
        ({"0": {"0": 1.0, "1": None}}, "layer 1: None is no scale"),
        ({"0": {"0": 1.0, "1": []}}, r"layer 1: \[\] is no scale"),
        ({"0": {"0": 1.0, "1": [1.0, [1.0]]}}, "layer 1: .* is no scale"),
        ({"0": {"0": 1.0, "1": 0.0}}, "layer 1: 0.0 is not positive"),
        ({"0": {"0": 1.0, "1": [1.0, -1.0, 1.0, 1.0]}}, "layer 1: .* is not positive"),
        ({"0": {"0": 1.0, "1": float("nan")}}, "layer 1: nan is not finite"),
        ({"0": {"0": 1.0, "1": float("inf")}}, "layer 1: inf is not finite"),
        ({"0": {"0": 1.0, "1": 10**400}}, "layer 1: 1000.* is not finite"),
        ({"0": {"0": 1.0, "1": 1e300}}, "layer 1: 1e\\+300 is not finite as a 32-bit scale"),
        ({"0": {"0": 1.0, "1": 1e-60}}, "layer 1: 1e-60 is not positive as a 32-bit scale"),
        ({"0": {"0": 1.0, "1": [1.0, 1.0]}}, "layer 1: rank 0 has 2 scales for 4 KV heads"),
        ({"0": {"0": 1.0, "1": [1.0]}, "1": {"0": 1.0, "1": [1.0]}}, "layer 1: rank 0 has 1 scales for 2 KV heads"),
        ({str(rank): {"0": 1.0, "1": rank + 1.0} for rank in range(3)}, "layer 1: 4 KV heads .* over its 3 ranks"),
        ({str(rank): {"0": 1.0, "1": rank + 1.0} for rank in range(8)}, "layer 1: ranks 0 and 1 .* and give 1 and 2"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused(tmp_path, factors, says):
    file = param_file(tmp_path, factors)
    with pytest.raises(CorruptModelError, match=says) as refused:
        read_scales(file, 2, 4)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"kv_cache": 1}', '{"scaling_factor": {"0": {"0": 1}}}'])
def test_another_json_file_is_refused(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(CorruptModelError, match="other.json"):
        read_scales(tmp_path / "other.json", 1, 1)


class VllmCache(BaseModel):
    dtype: str
    scaling_factor: dict[int, dict[int, float]]


class VllmSchema(BaseModel):
    """What vLLM and SGLang read a file with."""

    model_type: str | None
    kv_cache: VllmCache


def test_what_is_written_is_what_vllm_reads(tmp_path):
    scales = KVScales((vector(0.5), vector(2.0)), (vector(0.25), vector(4.0)))
    write_scales(tmp_path, scales, "vllm", model_type="llama", tp_size=2)
    read = VllmSchema.model_validate_json((tmp_path / "kv_cache_scales.json").read_text())
    assert (read.model_type, read.kv_cache.dtype) == ("llama", "float8_e4m3fn")
    assert read.kv_cache.scaling_factor == {rank: {0: 0.5, 1: 4.0} for rank in range(2)}


@pytest.mark.parametrize(
    ("tp_size", "expected"),
    [(1, [[1.0, 9.0]]), (2, [[1.0], [9.0]]), (4, [[1.0], [1.0], [9.0], [9.0]])],
)
def test_scales_of_heads_are_split_over_the_ranks(tmp_path, tp_size, expected):
    write_scales(tmp_path, KVScales((vector(1, 2),), (vector(1, 9),)), "vllm", tp_size=tp_size)
    factors = json.loads((tmp_path / "kv_cache_scales.json").read_text())["kv_cache"]["scaling_factor"]
    assert factors == {str(rank): {"0": part} for rank, part in enumerate(expected)}


def test_heads_that_do_not_divide_over_the_ranks_are_refused_and_nothing_is_written(tmp_path):
    step = (vector(1, 2, 3, 4, 5, 6),)
    with pytest.raises(ConfigError, match="6 KV heads cannot be split over a tensor-parallel size of 4"):
        write_scales(tmp_path, KVScales(step, step), "vllm", tp_size=4)
    assert not list(tmp_path.iterdir())


# ---- tensors of a checkpoint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("qkv_proj.k_scale", "qkv_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_every_name_of_a_scale(tmp_path, key, value, prefix):
    layers = [{key: vector(0.5), value: vector(0.25)}, {key: torch.tensor(2.0), value: torch.tensor(4.0).half()}]
    tensor_file(tmp_path, layers, prefix=prefix)
    read = read_scales(tmp_path, 2, 4)
    assert numbers(read.keys) == [[0.5], [2.0]]
    assert numbers(read.values) == [[0.25], [4.0]]


@pytest.mark.parametrize("shape", [(4,), (4, 1, 1), (1, 4, 1, 1)])
def test_scales_of_heads_come_in_several_shapes(tmp_path, shape):
    layer = {"k_scale": vector(1, 2, 3, 4).reshape(shape), "v_scale": vector(0.5).reshape(1, 1, 1)}
    tensor_file(tmp_path, [layer])
    read = read_scales(tmp_path / "model.safetensors", 1, 4)
    assert numbers(read.keys) == [[1.0, 2.0, 3.0, 4.0]]
    assert numbers(read.values) == [[0.5]]


def test_a_fused_scale_serves_keys_and_values_and_a_pair_goes_before_it(tmp_path):
    tensor_file(
        tmp_path, [{"kv_scale": vector(0.5)}, {"kv_scale": vector(9), "k_scale": vector(1), "v_scale": vector(2)}]
    )
    read = read_scales(tmp_path, 2, 4)
    assert numbers(read.keys) == [[0.5], [1.0]]
    assert numbers(read.values) == [[0.5], [2.0]]


def test_only_the_scales_of_a_sharded_checkpoint_are_read(tmp_path, monkeypatch):
    for layer in (0, 1):
        name = f"model-{layer}.safetensors"
        scales = {ATTENTION.format(layer) + side: vector(layer + 1) for side in ("k_scale", "v_scale")}
        save_file(scales | {f"model.layers.{layer}.mlp.up_proj.weight": torch.zeros(8, 8)}, tmp_path / name)
    names = {f"x{layer}": f"model-{layer}.safetensors" for layer in (0, 1)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "stray.safetensors").write_bytes(b"not in the index")
    asked = watch_reads(monkeypatch)
    assert numbers(read_scales(tmp_path, 2, 4).keys) == [[1.0], [2.0]]
    assert sorted(asked) == sorted(ATTENTION.format(layer) + f"{side}_scale" for layer in (0, 1) for side in "kv")


def watch_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are read from now on."""
    from kvant.weights.sources import safetensors

    asked: list[str] = []

    class Watched:
        def __init__(self, file: Any) -> None:
            self._file = file

        def keys(self) -> Any:
            return self._file.keys()

        def metadata(self) -> Any:
            return self._file.metadata()

        def get_tensor(self, name: str) -> Tensor:
            asked.append(name)
            return self._file.get_tensor(name)

    opened = safetensors.safe_open
    monkeypatch.setattr(safetensors, "safe_open", lambda *where, **how: Watched(opened(*where, **how)))
    return asked


def test_the_scales_of_other_towers_are_not_the_text_models(tmp_path):
    names = ("vision_tower.encoder.layers.0.self_attn.k_scale", "model.layers.0.mlp.k_scale")
    save_file({name: vector(1) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="holds no static KV scales"):
        read_scales(tmp_path, 1, 1)


def test_the_ranks_of_a_tensorrt_llm_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {"kv_cache_quant_algo": "INT8"}}))
    for rank, step in enumerate((0.5, 0.25)):
        name = "transformer.layers.0.attention.kv_cache_scaling_factor"
        save_file({name: vector(step)}, tmp_path / f"rank{rank}.safetensors")
    read = read_scales(tmp_path, 1, 4)
    assert numbers(read.keys) == numbers(read.values) == [[0.5, 0.5, 0.25, 0.25]]
    assert read.codes == "int8"
    (tmp_path / "rank0.safetensors").unlink()
    with pytest.raises(CorruptModelError, match="rank0.safetensors is missing"):
        read_scales(tmp_path, 1, 4)


GOOD = {"k_scale": vector(1), "v_scale": vector(1)}


@pytest.mark.parametrize(
    ("layer", "error", "says"),
    [
        ({}, CorruptModelError, "layer 1 has no scale for keys"),
        ({"k_scale": vector(1)}, CorruptModelError, "layer 1 has no scale for values"),
        ({"v_proj.output_scale": vector(1)}, CorruptModelError, "layer 1 has no scale for keys"),
        (GOOD | {"v_scale": vector(0)}, CorruptModelError, "layer 1: v_scale is not positive"),
        (GOOD | {"v_scale": vector(torch.inf)}, CorruptModelError, "layer 1: v_scale is not finite"),
        (GOOD | {"k_scale": vector(1, 2)}, CorruptModelError, "layer 1: rank 0 has 2 scales for 4 KV heads"),
        (GOOD | {"k_scale": torch.ones(2, 2)}, CorruptModelError, r"k_scale is torch.float32 of shape \[2, 2\]"),
        (GOOD | {"k_scale": torch.ones(0)}, CorruptModelError, r"k_scale is torch.float32 of shape \[0\]"),
        (GOOD | {"k_scale": torch.ones(1, dtype=torch.int8)}, CorruptModelError, "k_scale is torch.int8"),
        (GOOD | {"k_zero_point": vector(3)}, UnsupportedModelError, "layer 1 has zero points"),
        (GOOD | {"v_proj.v_bias": vector(3)}, UnsupportedModelError, "layer 1 has zero points"),
    ],
)
def test_scales_that_are_not_as_they_should_be_are_refused(tmp_path, layer, error, says):
    tensor_file(tmp_path, [GOOD, layer])
    with pytest.raises(error, match=says) as refused:
        read_scales(tmp_path, 2, 4)
    assert str(tmp_path / "model.safetensors") in str(refused.value)


def test_scales_of_more_layers_than_the_model_has_are_refused(tmp_path):
    tensor_file(tmp_path, [GOOD] * 3)
    with pytest.raises(CorruptModelError, match="has scales for layer 2, the model has 2 layers"):
        read_scales(tmp_path, 2, 4)


def test_zero_points_of_zero_are_no_offset(tmp_path):
    tensor_file(tmp_path, [GOOD | {"k_zero_point": torch.zeros(1, dtype=torch.int8)}])
    assert numbers(read_scales(tmp_path, 1, 4).keys) == [[1.0]]


INT8 = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize(
    ("file", "note", "codes"),
    [
        ("config.json", {"quantization_config": {"kv_cache_scheme": INT8}}, "int8"),
        ("config.json", {"quantization_config": {"kv_cache_scheme": INT8 | {"type": "float"}}}, "fp8"),
        ("config.json", {"quantization_config": {"kv_cache_scheme": None}}, None),
        ("config.json", {"quantization_config": {"quantization": {"kv_cache_quant_algo": "FP8"}}}, "fp8"),
        ("config.json", {"quantization_config": {"kv_cache_scheme": "INT8"}}, "int8"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}}, "int8"),
    ],
)
def test_the_checkpoint_says_what_its_scales_are_for(tmp_path, file, note, codes):
    tensor_file(tmp_path, [GOOD])
    (tmp_path / file).write_text(json.dumps(note))
    assert read_scales(tmp_path, 1, 4).codes == codes


@pytest.mark.parametrize(
    "scheme",
    [
        *(
            INT8 | change
            for change in ({"num_bits": 4}, {"dynamic": True}, {"symmetric": False}, {"strategy": "channel"})
        ),
        *("NVFP4", INT8 | {"type": "complex"}),
    ],
)
def test_scales_of_another_kind_of_cache_are_refused(tmp_path, scheme):
    tensor_file(tmp_path, [GOOD])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"kv_cache_scheme": scheme}}))
    with pytest.raises(UnsupportedModelError, match="static symmetric scales"):
        read_scales(tmp_path, 1, 4)


def test_the_names_and_notes_that_each_layout_is_written_with(tmp_path):
    scales = KVScales((vector(1),), (vector(2),), "int8")
    names = {layout: set(scale_tensors(scales, layout)) for layout in TENSOR_LAYOUTS}
    prefix = ATTENTION.format(0)
    assert names == {
        "compressed-tensors": {f"{prefix}k_scale", f"{prefix}v_scale"},
        "modelopt": {f"{prefix}k_proj.k_scale", f"{prefix}v_proj.v_scale"},
        "output-scale": {f"{prefix}k_proj.output_scale", f"{prefix}v_proj.output_scale"},
        "fused": {f"{prefix}kv_scale"},
    }
    assert scale_tensors(scales, "fused")[f"{prefix}kv_scale"].tolist() == [2.0]

    write_scales(tmp_path / "ct", KVScales((vector(1, 2),), (vector(3),), "int8"), "compressed-tensors")
    written = load_file(tmp_path / "ct" / "kv_scales.safetensors")
    assert {name: step.tolist() for name, step in written.items()} == {
        f"{prefix}k_scale": [1.0, 2.0],
        f"{prefix}v_scale": [3.0, 3.0],
    }
    note = json.loads((tmp_path / "ct" / "kv_cache_scheme.json").read_text())["quantization_config"]
    assert note["quant_method"] == "compressed-tensors"
    assert note["kv_cache_scheme"] == INT8 | {"strategy": "attn_head"}

    write_scales(tmp_path / "mo", KVScales(scales.keys, scales.values, "fp8"), "modelopt")
    note = json.loads((tmp_path / "mo" / "hf_quant_config.json").read_text())
    assert note["producer"]["name"] == "modelopt"
    assert note["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": []}


@pytest.mark.parametrize("layout", ["modelopt", "output-scale", "fused"])
def test_a_layout_with_one_scale_a_layer_takes_no_scales_of_heads(tmp_path, layout):
    scales = KVScales((vector(1, 2),), (vector(3, 1),), "fp8")
    with pytest.raises(ConfigError, match="holds one scale a layer"):
        write_scales(tmp_path, scales, layout)
    assert not list(tmp_path.iterdir())
    write_scales(tmp_path, scales.per_layer(), layout)
    expected = ([[3.0]] if layout == "fused" else [[2.0]], [[3.0]])
    read = read_scales(tmp_path, 1, 2)
    assert (numbers(read.keys), numbers(read.values)) == expected


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_a_layout_that_tells_the_codes_wants_to_know_them(tmp_path, layout):
    with pytest.raises(ConfigError, match=r"set KVScales\.codes"):
        write_scales(tmp_path, KVScales((vector(1),), (vector(1),)), layout)


# ---- which file of several, and what is in the memory


def test_of_a_directory_the_file_made_for_scales_goes_first(tmp_path):
    param_file(tmp_path, {"0": {"0": 3.0}})
    assert numbers(read_scales(tmp_path, 1, 4).keys) == [[3.0]]
    tensor_file(tmp_path, [{"k_scale": vector(2), "v_scale": vector(2)}])
    assert numbers(read_scales(tmp_path, 1, 4).keys) == [[2.0]]
    write_scales(tmp_path, KVScales((vector(1),), (vector(1),)), "output-scale")
    assert numbers(read_scales(tmp_path, 1, 4).keys) == [[1.0]]


def test_paths_without_scales(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; name a kv_cache_scales.json"):
        read_scales(tmp_path / "nothing", 1, 1)
    with pytest.raises(ConfigError, match="holds no static KV scales"):
        read_scales(tmp_path, 1, 1)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"model.gguf: KV scales are read from a .json file"):
        read_scales(tmp_path / "model.gguf", 1, 1)


@pytest.mark.parametrize(
    ("keys", "values", "says"),
    [
        ((vector(1), vector(1)), (vector(1),), "keys of 2 layers, for the values of 1"),
        ((vector(1), vector(0)), (vector(1), vector(1)), "layer 1: the keys' scale .* not positive"),
        ((vector(1),), (vector(torch.nan),), "layer 0: the values' scale .* not finite"),
        ((torch.tensor(1.0),), (vector(1),), "no vector of float32"),
        ((vector(1).double(),), (vector(1),), "no vector of float32"),
    ],
)
def test_scales_are_checked_before_anything_is_written(keys, values, says):
    with pytest.raises(ConfigError, match=says):
        KVScales(keys, values)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    scales = KVScales((vector(1),), (vector(1),))
    write_scales(tmp_path, scales, "vllm")
    before = (tmp_path / "kv_cache_scales.json").read_bytes()

    def full(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ConfigError, match="kv_cache_scales.json cannot be written: .*No space left"):
        write_scales(tmp_path, KVScales((vector(2),), (vector(2),)), "vllm")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["kv_cache_scales.json"]
    assert (tmp_path / "kv_cache_scales.json").read_bytes() == before


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 3, "num_key_value_heads": 2}, (3, 2, None)),
        ({"architecture": "LlamaForCausalLM", "num_hidden_layers": 3, "num_attention_heads": 8}, (3, 8, None)),
        ({"text_config": {"model_type": "x", "num_hidden_layers": 1, "num_key_value_heads": 4}}, (1, 4, "x")),
    ],
)
def test_the_sizes_of_a_cache_need_no_architecture_that_runs(tmp_path, config, sizes):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = cache_sizes(tmp_path)
    assert (found.num_layers, found.num_kv_heads, found.model_type) == sizes


# ---- what is written is read

STEP = st.floats(2.0**-120, 2.0**120, width=32)


@st.composite
def scales_of(draw: st.DrawFn, *, heads: int, per_head: bool) -> KVScales:
    size = heads if per_head else 1
    layers = draw(st.integers(1, 4))
    side = st.lists(st.lists(STEP, min_size=size, max_size=size).map(torch.tensor), min_size=layers, max_size=layers)
    return KVScales(tuple(draw(side)), tuple(draw(side)), draw(st.sampled_from(["int8", "fp8"])))


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@given(st.data(), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.booleans())
def test_the_json_file_holds_the_larger_scale_exactly(data, heads, tp_size, per_head):
    scales = data.draw(scales_of(heads=heads, per_head=per_head))
    with tempfile.TemporaryDirectory() as folder:
        write_scales(Path(folder), scales, "vllm", tp_size=tp_size)
        read = read_scales(Path(folder), scales.num_layers, heads)
    larger = tuple(torch.where(key > value, key, value) for key, value in zip(scales.keys, scales.values, strict=True))
    assert same(read.keys, larger)
    assert same(read.values, larger)


@given(st.data(), st.sampled_from(TENSOR_LAYOUTS), st.sampled_from([1, 2, 8]), st.booleans())
def test_tensors_hold_the_scales_exactly(data, layout, heads, per_head):
    scales = data.draw(scales_of(heads=heads, per_head=per_head and layout == "compressed-tensors"))
    with tempfile.TemporaryDirectory() as folder:
        write_scales(Path(folder), scales, layout)
        read = read_scales(Path(folder), scales.num_layers, heads)
    fused = layout == "fused"
    assert same(read.keys, scales.shared() if fused else scales.keys)
    assert same(read.values, scales.shared() if fused else scales.values)
    assert read.codes == scales.codes


@pytest.mark.parametrize("codes", ["int8", "fp8", None])
def test_the_json_file_tells_its_codes_where_they_are_known(tmp_path, codes):
    """Steps of fp8 codes read as those of int8 would cut off everything beyond 28% of the range."""
    scales = KVScales((vector(0.5),), (vector(0.5),), codes)
    write_scales(tmp_path, scales, "vllm")
    assert read_scales(tmp_path / "kv_cache_scales.json", 1, 4).codes == codes
    content = json.loads((tmp_path / "kv_cache_scales.json").read_text())
    assert content["kv_cache"]["dtype"] == "float8_e4m3fn"
    assert content.get("codes") == codes
