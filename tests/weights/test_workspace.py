"""Converted models: what they give, how they lie in memory and on disk, and what they refuse."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from kvant.errors import ConfigError, CorruptModelError, UnsupportedModelError
from kvant.kernels.cpu.weights import NativeWeight
from kvant.kernels.ops import Ops
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.select import available_backends
from kvant.models.families import model_spec
from kvant.quantize.rtn import rtn
from kvant.text.directory import load_tokenizer
from kvant.weights import workspace
from kvant.weights.convert import Target, convert
from kvant.weights.load import LoadedModel, WeightLoader, generation_defaults, inspect_model, load_model, open_source
from kvant.weights.locate import locate
from kvant.weights.matrices import MatrixReader, Rounding
from kvant.weights.workspace import ALIGNMENT, ShardWriter, WorkspaceSource
from tests.engine.checkpoint import write_checkpoint
from tests.families.configs import TINIES
from tests.families.gguf_files import store, write_gguf
from tests.families.tiny import build
from tests.support import NATIVE, SingleText
from tests.weights.codecs.checkpoints import llama
from tests.weights.codecs.test_models import MODELS

# Between them: biases of all linears, norms of heads and after blocks, tied embeddings, fused and grouped projections.
FAMILIES = ("llama-bias", "qwen3-bias", "gemma-2", "gemma-3-1b", "phi-4-mini", "internlm2", "qwen-v1")
IDS = [7 * i % 120 for i in range(40)]
INT4 = Rounding("int4 in groups of 32", 4.5, partial(rtn, bits=4, group_size=32))
INT8 = Rounding("int8 in groups of 64", 8.25, partial(rtn, bits=8, group_size=64))


class Device(ReferenceOps):
    """A backend that a model may be converted for, and that computes here."""

    name = "cuda"
    packed_weights = True


def made(path: Path, out: Path, ops: Ops | None = None, **target: Any) -> Path:
    """The checkpoint at a path, converted."""
    convert(open_source(path), out, Target(**target), ops or ReferenceOps())
    return out


def logits(model: LoadedModel) -> Tensor:
    return SingleText(model.decoder, len(IDS), len(IDS)).feed(IDS)


@pytest.fixture(scope="module")
def native() -> Callable[..., Ops]:
    """The native backend, the best one or one by name."""
    if not NATIVE:
        pytest.skip("the native kernels are not built")
    return lambda name=NATIVE[0]: available_backends()[name]()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of sizes that every kernel has a loop for, and two ranks too."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    path = write_checkpoint(tmp_path_factory.mktemp("wide"), **sizes)
    (path / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": [3, 4]}))
    return path


@pytest.fixture(scope="module")
def converted(wide: Path, native: Callable[..., Ops], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(wide, tmp_path_factory.mktemp("converted") / "out", native(), weights=INT4, dtype="float32")


@pytest.fixture
def copy(converted: Path, tmp_path: Path) -> Path:
    """The converted model, to be damaged."""
    return Path(shutil.copytree(converted, tmp_path / "copy"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_gives_the_same_bits(native, family, dtype, tmp_path):
    path = build(TINIES[family], tmp_path / "family").published
    shutil.copy(write_checkpoint(tmp_path / "tokenizer") / "tokenizer.json", path)
    direct = load_model(path, dtype=dtype, ops=native())
    mapped = load_model(made(path, tmp_path / "out", native(), dtype=dtype), dtype="auto", ops=native())
    assert torch.equal(logits(mapped), logits(direct))
    assert (mapped.spec, mapped.dtype, mapped.eos_token_ids) == (direct.spec, direct.dtype, direct.eos_token_ids)


@pytest.mark.parametrize("name", MODELS)
def test_every_quantized_checkpoint_gives_the_same_bits(native, name, tmp_path):
    torch.manual_seed(0)
    path = llama(tmp_path / "m", *MODELS[name], intermediate_size=64).quantized
    shutil.copy(write_checkpoint(tmp_path / "tokenizer") / "tokenizer.json", path)
    for backend, ops in (("cpu", native()), ("cuda", Device())):
        direct = load_model(path, dtype="float32", ops=ops)
        out = made(path, tmp_path / backend, ops, dtype="float32", backend=backend)
        assert torch.equal(logits(load_model(out, dtype="auto", ops=ops)), logits(direct))
    exact = logits(load_model(path, dtype="float32", ops=ReferenceOps(), weights="dense"))
    rounded = logits(load_model(path, dtype="float32", ops=native()))
    assert (rounded - exact).norm() <= 0.1 * exact.norm()


@pytest.mark.parametrize("isa", NATIVE)
@pytest.mark.parametrize("weights", [INT4, INT8, "dense"], ids=["int4", "int8", "dense"])
def test_every_instruction_set_maps_what_another_packed(native, wide, weights, isa, tmp_path):
    direct = load_model(wide, dtype="float32", ops=native(isa), weights=weights)
    out = made(wide, tmp_path / "out", native(NATIVE[-1]), weights=weights, dtype="float32")
    mapped = load_model(out, dtype="float32", ops=native(isa), weights=weights)
    assert torch.equal(logits(mapped), logits(direct))
    assert mapped.rounding == direct.rounding
    assert mapped.mapped_bytes == (out / "rank-0.bin").stat().st_size


def test_nothing_but_the_config_is_needed_of_the_checkpoint(converted, wide):
    source = open_source(locate(converted))
    assert isinstance(source, WorkspaceSource)
    assert inspect_model(converted) == inspect_model(wide)
    assert source.num_parameters() == open_source(wide).num_parameters()
    assert generation_defaults(source) == {"temperature": 0.5}
    assert {path.name for path in source.files()} == {"workspace.json", "rank-0.bin"}
    theirs, ours = load_tokenizer(converted), load_tokenizer(wide)
    assert theirs.encode("hello<|im_end|>") == ours.encode("hello<|im_end|>")
    assert (theirs.end_ids, theirs.chat_template) == (ours.end_ids, ours.chat_template)
    with pytest.raises(UnsupportedModelError, match="use the model it was made from"):
        source.checked("model.norm.weight", (128,), torch.float32)


def test_weights_lie_in_the_mapped_file(native, converted):
    model = load_model(converted, dtype="auto", ops=native())
    lines = [
        line
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(converted / "rank-0.bin"))
    ]
    places = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]
    weights = model.decoder._weights
    assert all(line.split()[1].startswith("r--") for line in lines)
    mapped = [weights.norm, weights.layers[0].input_norm]
    for weight in (weights.embedding, weights.layers[1].attention.qkv.weight, weights.layers[1].mlp.down.weight):
        assert isinstance(weight, NativeWeight)
        mapped += weight.memory.values()
    for tensor in mapped:
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert any(start <= tensor.data_ptr() < stop for start, stop in places)


def test_a_device_gets_its_planes(wide, tmp_path):
    out = made(wide, tmp_path / "out", backend="cuda", weights=INT4)
    source = open_source(out)
    assert source.made.dtype == "bfloat16"  # the checkpoint's is wider than a device computes in
    direct = load_model(wide, dtype="float32", ops=Device(), weights=INT4)
    mapped = load_model(
        made(wide, tmp_path / "32", backend="cuda", weights=INT4, dtype="float32"), dtype="auto", ops=Device()
    )
    assert torch.equal(logits(mapped), logits(direct))


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_blocks_of_a_file_are_converted_for_every_backend(native, kind, backend, tmp_path, monkeypatch):
    monkeypatch.setattr("kvant.weights.convert._write_text", lambda *text: None)  # the miniature has no tokenizer
    tiny = build(TINIES["llama-3.1"], tmp_path)
    stored = {
        name: store(weight, kind if weight.dim() == 2 and weight.shape[1] % 32 == 0 else Kind.F32)
        for name, weight in tiny.reference.weights.items()
    }
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", tiny.tiny.config, stored)
    ops = native() if backend == "cpu" else Device()
    direct = load_model(path, dtype="float32", ops=ops)
    convert(open_source(path), tmp_path / "out", Target(backend=backend, dtype="float32"), ops)
    assert torch.equal(logits(load_model(tmp_path / "out", dtype="auto", ops=ops)), logits(direct))


def piece(shard: workspace.Shard, name: str, *shape: int) -> Tensor:
    """The values that a shard has."""
    found = shard.piece(name, shape)
    return found if isinstance(found, Tensor) else found.dequantize(torch.float32)


@pytest.mark.parametrize("weights", [INT4, "dense"], ids=["int4", "dense"])
def test_ranks_put_together_are_the_model(tmp_path, weights):
    """Heads, MLP units and vocabulary are shared; a bias that is added to the ranks' sum is on one of them."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256}
    sizes |= {"intermediate_size": 256, "attention_bias": True, "mlp_bias": True}
    path = build(replace(TINIES["llama-bias"], config=TINIES["llama-bias"].config | sizes), tmp_path / "m").published
    shutil.copy(write_checkpoint(tmp_path / "tokenizer") / "tokenizer.json", path)
    source = open_source(made(path, tmp_path / "out", backend="cuda", weights=weights, dtype="float32", tp=2))
    first, second = (source.open_shard(rank) for rank in range(2))
    whole = layer_values(path, weights)
    q, k, v = whole["qkv"].split([128, 64, 64])
    qkv = [piece(shard, "layers.1.qkv", 128, 128).split([64, 32, 32]) for shard in (first, second)]
    assert torch.equal(torch.cat([torch.cat(parts) for parts in zip(*qkv, strict=True)]), torch.cat([q, k, v]))
    biases = [piece(shard, "layers.1.qkv.bias", 128).split([64, 32, 32]) for shard in (first, second)]
    assert torch.equal(torch.cat([torch.cat(parts) for parts in zip(*biases, strict=True)]), whole["qkv.bias"])
    gate_up = [piece(shard, "layers.1.gate_up", 256, 128).chunk(2) for shard in (first, second)]
    assert torch.equal(torch.cat([torch.cat(parts) for parts in zip(*gate_up, strict=True)]), whole["gate_up"])
    for name, columns in (("out", 64), ("down", 128)):
        parts = [piece(shard, f"layers.1.{name}", 128, columns) for shard in (first, second)]
        assert torch.equal(torch.cat(parts, dim=1), whole[name])
        assert torch.equal(piece(first, f"layers.1.{name}.bias", 128), whole[f"{name}.bias"])
        assert f"layers.1.{name}.bias" not in second
    for shard in (first, second):
        assert torch.equal(piece(shard, "layers.1.mlp_norm", 128), whole["mlp_norm"])
    rows = [piece(shard, "embedding", 128, 128) for shard in (first, second)]
    assert torch.equal(torch.cat(rows), whole["embedding"])


def layer_values(path: Path, weights: str | Rounding) -> dict[str, Tensor]:
    """What a direct reading has of the second layer, and the embedding."""
    source = open_source(path)
    reader = MatrixReader(source, torch.float32, weights, packed=True)
    loader = WeightLoader(source, model_spec(source.config), reader, ReferenceOps())
    layer = loader.layer(1)
    linears = {
        "qkv": layer.attention.qkv,
        "out": layer.attention.out,
        "gate_up": layer.mlp.gate_up,
        "down": layer.mlp.down,
    }
    values = {name: linear.weight for name, linear in linears.items()}
    values |= {f"{name}.bias": linear.bias for name, linear in linears.items()}
    return {**values, "mlp_norm": layer.mlp_norm, "embedding": loader.embedding()}


def test_a_vocabulary_that_cannot_be_shared_is_on_every_rank(wide, tmp_path):
    spec = inspect_model(wide)
    assert spec.vocab_size % 2
    source = open_source(made(wide, tmp_path / "out", backend="cuda", tp=2))
    for rank in range(2):
        for name in ("embedding", "head"):
            assert source.open_shard(rank).piece(name, (spec.vocab_size, spec.hidden_size)) is not None


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({"tp": 3}, "4 heads do not divide into 3"),
        ({"tp": 4}, "2 KV heads do not divide into 4"),
        ({"tp": 2, "weights": Rounding("int4", 4, partial(rtn, bits=4, group_size=128))}, "cut through a group of 128"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused(tmp_path, target, words):
    path = write_checkpoint(tmp_path / "m", hidden_size=128, intermediate_size=384, head_dim=32)
    with pytest.raises(ConfigError, match=words):
        made(path, tmp_path / "out", backend="cuda", **target)
    assert sorted(tmp_path.iterdir()) == [path]


def test_another_backend_is_refused(native, wide, converted, tmp_path):
    with pytest.raises(UnsupportedModelError, match="made for the native kernels .*'reference' computes here"):
        load_model(converted, dtype="auto", ops=ReferenceOps())
    device = made(wide, tmp_path / "out", backend="cuda")
    for ops in (native(), ReferenceOps()):
        with pytest.raises(UnsupportedModelError, match="made for a cuda device.*--backend cpu"):
            load_model(device, dtype="auto", ops=ops)
    with pytest.raises(ConfigError, match="native kernels"):
        made(wide, tmp_path / "other")


def test_several_ranks_are_refused(native, wide, tmp_path):
    out = made(wide, tmp_path / "out", native(), tp=2)
    assert sorted(path.name for path in out.glob("*.bin")) == ["rank-0.bin", "rank-1.bin"]
    with pytest.raises(UnsupportedModelError, match="made for 2 tensor-parallel ranks"):
        load_model(out, dtype="auto", ops=native())


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"weights": INT8}, "weights='int4 in groups of 32', which cannot become 'int8 in groups of 64'"),
        ({"weights": "dense"}, "cannot become 'dense'"),
        ({"dtype": "bfloat16"}, "dtype='float32', which cannot become 'bfloat16'"),
    ],
)
def test_other_weights_and_types_are_refused(native, converted, asked, words):
    with pytest.raises(UnsupportedModelError, match=words):
        load_model(converted, ops=native(), **({"dtype": "auto"} | asked))


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "workspace.json"
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))


@pytest.mark.parametrize(
    ("key", "words"), [("format", "in format 99, and this one reads format 1"), ("layout", "has layout 99")]
)
def test_other_versions_are_refused(native, copy, key, words):
    edit(copy, lambda header: header.update({key: 99}))
    with pytest.raises(UnsupportedModelError, match=f"{words}.*onvert the model again"):
        load_model(copy, dtype="auto", ops=native())


def norm(header: dict[str, Any]) -> dict[str, Any]:
    return header["shards"][0]["pieces"]["norm"]["tensors"]["data"]


def qkv(header: dict[str, Any]) -> dict[str, Any]:
    return header["shards"][0]["pieces"]["layers.0.qkv"]


DAMAGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no config": lambda header: header.pop("config"),
    "no shard": lambda header: header["shards"].clear(),
    "another backend": lambda header: header.update(backend="abacus"),
    "another dtype": lambda header: header.update(dtype="int3"),
    "no pieces": lambda header: header["shards"][0].update(pieces=[3]),
    "a piece is missing": lambda header: header["shards"][0]["pieces"].pop("layers.0.out"),
    "another shape": lambda header: norm(header).update(shape=[64], nbytes=256),
    "outside of the file": lambda header: norm(header).update(offset=1 << 40),
    "before the file": lambda header: norm(header).update(offset=-64),
    "not aligned": lambda header: norm(header).update(offset=4),
    "another length": lambda header: norm(header).update(nbytes=-512),
    "an unknown type": lambda header: norm(header).update(dtype="complex"),
    "more rows": lambda header: qkv(header)["facts"].update(rows=1024),
    "more columns": lambda header: qkv(header)["facts"].update(columns=4096),
    "another group": lambda header: qkv(header)["facts"].update(group=48),
    "no group": lambda header: qkv(header)["facts"].update(group=0),
    "another kind": lambda header: qkv(header)["facts"].update(kind="int8"),
    "no kind": lambda header: qkv(header)["facts"].update(kind=3),
    "rows of text": lambda header: qkv(header)["facts"].update(rows="many"),
    "no scales": lambda header: qkv(header)["tensors"].pop("scales"),
    "an order of codes": lambda header: qkv(header)["tensors"].update(order=qkv(header)["tensors"]["codes"]),
    "a tensor too many": lambda header: qkv(header)["tensors"].update(more=qkv(header)["tensors"]["codes"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_header_is_told_before_the_kernels_follow_it(native, copy, damage):
    edit(copy, DAMAGES[damage])
    with pytest.raises(CorruptModelError, match=r"convert the model again|the config implies"):
        load_model(copy, dtype="auto", ops=native())


def test_a_truncated_or_missing_shard_is_told(native, copy):
    file = copy / "rank-0.bin"
    content = file.read_bytes()
    for damaged in (content[:-1], content[: len(content) // 2], b"", content + b"x"):
        file.write_bytes(damaged)
        with pytest.raises(CorruptModelError, match=r"rank-0.bin has [\d,]+ bytes where"):
            load_model(copy, dtype="auto", ops=native())
    file.unlink()
    with pytest.raises(CorruptModelError, match="cannot be mapped"):
        load_model(copy, dtype="auto", ops=native())


def test_half_a_header_is_told(native, copy):
    header = copy / "workspace.json"
    header.write_text(header.read_text()[:1000])
    with pytest.raises(CorruptModelError, match="cannot be read as JSON"):
        load_model(copy, dtype="auto", ops=native())


@pytest.mark.parametrize(
    ("raised", "told"),
    [(OSError(errno.ENOSPC, "No space left"), ConfigError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_what_was_not_finished_leaves_nothing(native, wide, monkeypatch, tmp_path, raised, told):
    calls: list[str] = []
    add = ShardWriter.add

    def failing(self: ShardWriter, name: str, weight: Any) -> None:
        calls.append(name)
        assert (tmp_path / "out.partial").is_dir()
        assert not (tmp_path / "out").exists()
        if len(calls) == 9:
            raise raised
        add(self, name, weight)

    monkeypatch.setattr(ShardWriter, "add", failing)
    with pytest.raises(told):
        made(wide, tmp_path / "out", native())
    assert list(tmp_path.iterdir()) == []


def test_what_was_killed_is_written_over(native, wide, tmp_path):
    stale = tmp_path / "out.partial"
    stale.mkdir()
    (stale / "rank-7.bin").write_bytes(b"half")
    out = made(wide, tmp_path / "out", native())
    assert list(tmp_path.iterdir()) == [out]
    assert not (out / "rank-7.bin").exists()


def test_the_unfinished_work_of_others_is_left_alone(native, wide, tmp_path):
    theirs = tmp_path / "out.partial" / "model-00001-of-00004.safetensors"
    theirs.parent.mkdir()
    theirs.write_bytes(b"hours")
    with pytest.raises(ConfigError, match="holds 'model-00001-of-00004.safetensors', which no conversion left"):
        made(wide, tmp_path / "out", native())
    assert theirs.read_bytes() == b"hours"


def test_nothing_is_written_over_and_nothing_converted_twice(native, wide, converted, tmp_path):
    with pytest.raises(ConfigError, match="exists; remove it"):
        made(wide, converted, native())
    with pytest.raises(ConfigError, match="convert the one that it was made from"):
        made(converted, tmp_path / "out", native())
