"""Checkpoints that are not what they should be are refused with the cause; good ones are mapped, not doubled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file

from kvant.errors import CorruptModelError, MemoryFitError, ModelNotFoundError, UnsupportedModelError
from kvant.kernels.reference import ReferenceOps
from kvant.models.families import model_spec
from kvant.weights.load import WeightLoader, generation_defaults, inspect_model, load_model, open_source
from kvant.weights.matrices import MatrixReader
from tests.families.configs import TINIES
from tests.families.gguf_files import store, write_gguf
from tests.families.tiny import build

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}


def _tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    hidden, width, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = hidden // config["num_attention_heads"]
    kv = head_dim * config["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden)}
    shapes["model.norm"] = (hidden,)
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small whole checkpoint."""
    save_file(_tensors(CONFIG), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def load(path: Path) -> None:
    load_model(path, dtype="float32", ops=ReferenceOps())


def _configure(**changes: Any) -> Callable[[Path], None]:
    return lambda path: (path / "config.json").write_text(json.dumps({**CONFIG, **changes})) and None


def _retensor(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")

    return apply


def _index(name: str) -> Callable[[Path], None]:
    text = json.dumps({"weight_map": {"lm_head.weight": name}})
    return lambda path: (path / "model.safetensors.index.json").write_text(text) and None


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pickle_only(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


K_PROJ = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("break_it", "error", "says"),
    [
        (_pickle_only, UnsupportedModelError, "pickled weights"),
        (lambda path: (path / "model.safetensors").unlink(), ModelNotFoundError, r"no \*.safetensors"),
        (lambda path: (path / "config.json").unlink(), ModelNotFoundError, "no config.json"),
        (lambda path: (path / "config.json").write_text("{"), CorruptModelError, "cannot be read as JSON"),
        (_truncate, CorruptModelError, "not a whole safetensors file"),
        (_index("../model.safetensors"), CorruptModelError, "outside"),
        (_index("model-00002.safetensors"), CorruptModelError, "missing"),
        (_retensor(lambda t: t.pop(K_PROJ)), CorruptModelError, "k_proj.weight' is missing"),
        (_retensor(lambda t: t.update({K_PROJ: torch.zeros(8, 32)})), CorruptModelError, "shape"),
        (_retensor(lambda t: t.update({K_PROJ: t[K_PROJ].to(torch.int8)})), UnsupportedModelError, "holds I8"),
        (_configure(num_hidden_layers=2), CorruptModelError, "missing"),
        (_configure(num_key_value_heads=3), CorruptModelError, "do not divide"),
        (_configure(hidden_size="32"), CorruptModelError, "a number was expected"),
        (_configure(architectures=["MambaForCausalLM"]), UnsupportedModelError, "MambaForCausalLM"),
        (_configure(architectures=None), CorruptModelError, "architecture"),
        (_configure(hidden_act="relu"), UnsupportedModelError, "relu"),
        (_configure(rope_scaling={"type": "mrope"}), UnsupportedModelError, "mrope"),
        (_configure(quantization_config={"quant_method": "aqlm"}), UnsupportedModelError, "aqlm"),
        (_configure(num_attention_heads=0), CorruptModelError, "does not describe a llama model"),
        (_configure(rope_scaling="linear"), CorruptModelError, "does not describe"),
        (_configure(rope_scaling={"type": "longrope"}), CorruptModelError, "short_factor"),
        (
            _retensor(lambda t: t.update({f"{K_PROJ[:-7]}_extra.weight": torch.zeros(2)})),
            UnsupportedModelError,
            "place",
        ),
    ],
)
def test_a_broken_checkpoint_is_refused(
    model: Path, break_it: Callable[[Path], Any], error: type[Exception], says: str
) -> None:
    load(model)
    break_it(model)
    with pytest.raises(error, match=says):
        load(model)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 64, b"not a model" * 100])
def test_a_broken_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(CorruptModelError, match="not a whole GGUF file"):
        open_source(file)


def test_a_truncated_gguf_is_refused(smollm2: Path, tmp_path: Path) -> None:
    """Its tensors would lie beyond the end of the file."""
    file = tmp_path / "short.gguf"
    with smollm2.open("rb") as whole:
        file.write_bytes(whole.read(50 << 20))
    with pytest.raises(CorruptModelError, match="not a whole GGUF file"):
        open_source(file)


def test_a_gguf_may_be_larger_than_memory(tmp_path: Path) -> None:
    """Its map takes none: a terabyte more at its end, which lies nowhere, changes nothing."""
    tiny = build(TINIES["llama-3.1"], tmp_path)
    weights = {name: store(weight, Kind.F32) for name, weight in tiny.reference.weights.items()}
    file = tmp_path / "model.gguf"
    write_gguf(file, "llama", tiny.tiny.config, weights)
    expected = open_source(file).read("token_embd.weight", torch.float32)
    try:
        os.truncate(file, 1 << 40)
    except OSError:
        pytest.skip("this file system has no such files")
    assert torch.equal(open_source(file).read("token_embd.weight", torch.float32), expected)


def test_small_layers_are_read_side_by_side_and_are_the_same(model: Path, threads: Any, monkeypatch: Any) -> None:
    config = {**CONFIG, "num_hidden_layers": 7}
    save_file(_tensors(config), model / "model.safetensors")
    _configure(num_hidden_layers=7)(model)
    read, readers = WeightLoader.layer, set()

    def noted(self: WeightLoader, index: int) -> Any:
        readers.add(threading.get_ident())
        return read(self, index)

    def down_projections() -> list[torch.Tensor]:
        readers.clear()
        source, ops = open_source(model), ReferenceOps()
        matrices = MatrixReader(source, torch.float32, "auto", ops.packed_weights)
        layers = WeightLoader(source, model_spec(source.config), matrices, ops).load().layers
        return [layer.mlp.down.weight for layer in layers]

    monkeypatch.setattr(WeightLoader, "layer", noted)
    threads(3)
    side_by_side = down_projections()
    assert threading.get_ident() not in readers
    assert torch.get_num_threads() == 3
    monkeypatch.setattr("kvant.weights.load._ELEMENTS_AT_ONCE", 1)
    assert all(map(torch.equal, down_projections(), side_by_side))
    assert readers == {threading.get_ident()}, "large layers are read one by one"


def test_a_list_of_layer_types_must_fit_the_layers(model: Path) -> None:
    config = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "layer_types": ["full_attention"] * 3}
    _configure(**config)(model)
    with pytest.raises(CorruptModelError, match="lists 3 layer_types for 1 layers"):
        inspect_model(model)


def test_weights_that_cannot_fit_are_refused_before_they_are_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvant.weights.load.available_memory", lambda: 1000)
    with pytest.raises(MemoryFitError, match="the weights take"):
        load(model)


def test_gemma_3_states_its_stretched_context() -> None:
    config = {
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
    }
    stretched = model_spec({**config, "rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert stretched.max_position == model_spec(config).max_position == 131072


def test_generation_config_gives_defaults_and_ends(model: Path) -> None:
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [7, 9], "max_length": 20}
    (model / "generation_config.json").write_text(json.dumps(settings))
    loaded = load_model(model, dtype="float32", ops=ReferenceOps())
    assert loaded.eos_token_ids == (7, 9)
    assert generation_defaults(loaded.source) == {"temperature": 0.6, "top_p": 0.9}


def test_inspecting_reads_no_weights(model: Path) -> None:
    _truncate_tensors = _retensor(lambda t: t.pop(K_PROJ))
    _truncate_tensors(model)
    assert inspect_model(model).num_kv_heads == 2


_LOAD_AND_WATCH = """
import sys, threading, time
from pathlib import Path
from kvant.kernels.reference import ReferenceOps
from kvant.weights.load import load_model

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    while not done:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

done, start = [], anonymous()
peak = [start]
thread = threading.Thread(target=watch)
thread.start()
model = load_model(Path(sys.argv[1]), dtype=sys.argv[2], ops=ReferenceOps())
done.append(True)
thread.join()
print(peak[0] - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "share"), [("float32", 1.25), ("bfloat16", 0.75)])
def test_loading_never_holds_two_copies(tmp_path: Path, dtype: str, share: float) -> None:
    """Peak memory beyond the mapped file, as a share of the model's size in the compute type.

    In float32 all is converted: one copy and the tensor at hand. In bfloat16 the mapped file itself serves; only what
    is fused (qkv, gate and up) is copied.
    """
    config = {**CONFIG, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 16000}
    tensors = {name: tensor.bfloat16() for name, tensor in _tensors(config).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = sum(tensor.numel() for tensor in tensors.values()) * getattr(torch, dtype).itemsize
    command = [sys.executable, "-c", textwrap.dedent(_LOAD_AND_WATCH), str(tmp_path), dtype]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert peak < share * size
