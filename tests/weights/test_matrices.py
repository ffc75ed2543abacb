"""What `weights` makes of a checkpoint's matrices, on backends that compute on quantized ones and on others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from kvant.config import EngineConfig
from kvant.errors import ConfigError, MemoryFitError
from kvant.formats.weight import PackedWeight
from kvant.kernels.reference import ReferenceOps
from kvant.quantize.load import load_configured
from kvant.quantize.rtn import rtn
from kvant.weights.load import LoadedModel, load_model, open_source
from kvant.weights.matrices import MatrixReader, Rounding
from tests.engine.checkpoint import write_checkpoint
from tests.families.configs import TINIES
from tests.families.gguf_files import store, write_gguf
from tests.families.tiny import build
from tests.support import SingleText

IDS = torch.randint(0, 120, (40,), generator=torch.Generator().manual_seed(0)).tolist()


class SeeingOps(ReferenceOps):
    """The reference, which notes the weights that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[PackedWeight] = []

    def prepare(self, weight: PackedWeight) -> Any:
        self.seen.append(weight)
        return super().prepare(weight)


class PackedOps(SeeingOps):
    """One that says that it computes on quantized weights."""

    packed_weights = True


def rounding(bits: int, group: int = 32) -> Rounding:
    return Rounding(f"int{bits} in groups of {group}", bits + 16 / group, partial(rtn, bits=bits, group_size=group))


def logits(model: LoadedModel) -> Tensor:
    return SingleText(model.decoder, len(IDS), len(IDS)).feed(IDS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), intermediate_size=64)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several kinds of blocks, within qkv too, and rows whose order is not ours."""
    directory = tmp_path_factory.mktemp("gguf")
    tiny = build(TINIES["llama-3.1"], directory)
    kinds = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0, Kind.F16)
    weights = {
        name: store(weight, kinds[i % len(kinds)] if weight.dim() == 2 and weight.shape[1] % 32 == 0 else Kind.F32)
        for i, (name, weight) in enumerate(tiny.reference.weights.items())
    }
    path = directory / "model.gguf"
    write_gguf(path, "llama", tiny.tiny.config, weights)
    return path


def test_fewer_bits_are_further_from_the_checkpoint(checkpoint: Path) -> None:
    dense = logits(load_model(checkpoint, dtype="float32", ops=ReferenceOps()))
    found = {
        bits: logits(load_model(checkpoint, dtype="float32", ops=ReferenceOps(), weights=rounding(bits)))
        for bits in (8, 4)
    }
    error = {bits: ((values - dense).norm() / dense.norm()).item() for bits, values in found.items()}
    assert 0 < error[8] < 0.05
    assert 5 * error[8] < error[4] < 0.6


@pytest.mark.parametrize("bits", [4, 8])
def test_expanded_and_packed_weights_are_the_same_model(checkpoint: Path, bits: int) -> None:
    expanded = load_model(checkpoint, dtype="float32", ops=ReferenceOps(), weights=rounding(bits))
    packed = load_model(checkpoint, dtype="float32", ops=PackedOps(), weights=rounding(bits))
    assert torch.equal(logits(expanded), logits(packed))
    assert expanded.rounding == packed.rounding == f"int{bits} in groups of 32"


@pytest.mark.parametrize("bits", [4, 8])
def test_a_rounded_model_is_the_model_of_its_rounded_values(checkpoint: Path, bits: int) -> None:
    def expand(weight: Tensor) -> PackedWeight:
        return PackedWeight.dense(rtn(weight, bits, 32).dequantize(torch.float32))

    rounded = load_model(checkpoint, dtype="float32", ops=ReferenceOps(), weights=rounding(bits))
    dense = load_model(checkpoint, dtype="float32", ops=ReferenceOps(), weights=Rounding("expanded", 32, expand))
    assert torch.equal(logits(rounded), logits(dense))


def test_every_matrix_is_rounded(checkpoint: Path) -> None:
    """Embedding and output head too, whatever the compute type; rounding sees the values as they are stored."""
    ops = PackedOps()
    load_model(checkpoint, dtype="bfloat16", ops=ops, weights=rounding(8))
    assert len(ops.seen) == 2 + 2 * 4
    assert {weight.format for weight in ops.seen} == {"int8"}
    stored = open_source(checkpoint).read("model.embed_tokens.weight", torch.float32)
    assert torch.equal(ops.seen[0].dequantize(torch.float32), rtn(stored, 8, 32).dequantize(torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_expanded_weights_are_of_the_compute_type(checkpoint: Path, dtype: torch.dtype) -> None:
    ops, packed = SeeingOps(), PackedOps()
    for backend in (ops, packed):
        load_model(checkpoint, dtype=str(dtype).removeprefix("torch."), ops=backend, weights=rounding(8))
    for expanded, weight in zip(ops.seen, packed.seen, strict=True):
        assert expanded.format == "dense"
        assert torch.equal(expanded.planes["weight"].data, weight.dequantize(dtype))


def test_auto_keeps_blocks_where_the_backend_computes_on_them(gguf_file: Path) -> None:
    ops = PackedOps()
    packed = load_model(gguf_file, dtype="float32", ops=ops)
    assert {weight.format for weight in ops.seen} >= {"q4_0", "q8_0", "int4", "int8"}
    dense = load_model(gguf_file, dtype="float32", ops=ReferenceOps())
    # Legacy blocks are packed without any rounding, their rows put in our order with them.
    assert torch.equal(logits(packed), logits(dense))
    assert packed.rounding is dense.rounding is None


@pytest.mark.parametrize(("packed", "weights"), [(False, "auto"), (False, "dense"), (True, "dense")])
def test_elsewhere_everything_is_expanded(gguf_file: Path, packed: bool, weights: str) -> None:
    source = open_source(gguf_file)
    matrices = MatrixReader(source, torch.bfloat16, weights, packed)
    name = "blk.0.attn_q"
    weight = matrices.read(name, source.shapes()[f"{name}.weight"])
    assert torch.equal(weight.planes["weight"].data, source.read(f"{name}.weight", torch.bfloat16))
    assert matrices.peak_bytes() == 2 * source.num_parameters()


def test_memory_is_counted_in_the_bits_that_are_kept(checkpoint: Path, gguf_file: Path) -> None:
    source = open_source(checkpoint)
    shapes = source.shapes().values()
    matrices, vectors = (sum(torch.Size(s).numel() for s in shapes if len(s) == n) for n in (2, 1))
    largest = max(torch.Size(s).numel() for s in shapes)
    reader = MatrixReader(source, torch.bfloat16, rounding(4, 64), packed=True)
    assert reader.peak_bytes() == int(matrices * 4.25 / 8) + 2 * vectors + 4 * largest
    blocks = open_source(gguf_file)
    held = MatrixReader(blocks, torch.bfloat16, "auto", packed=True)
    kept = [held.read(n.removesuffix(".weight"), s) for n, s in blocks.shapes().items() if len(s) == 2]
    rest = sum(2 * torch.Size(s).numel() for s in blocks.shapes().values() if len(s) == 1)
    assert held.peak_bytes() == sum(weight.nbytes for weight in kept) + rest


def test_fewer_bits_fit_where_many_do_not(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = 4 * open_source(checkpoint).num_parameters()
    monkeypatch.setattr("kvant.weights.load.available_memory", lambda: int(0.9 * dense))
    with pytest.raises(MemoryFitError, match="the weights take .* use weights='int4', a smaller model"):
        load_model(checkpoint, dtype="float32", ops=PackedOps())
    with pytest.raises(MemoryFitError, match="the weights take .* use a 16-bit dtype, a smaller model"):
        load_model(checkpoint, dtype="float32", ops=ReferenceOps())
    load_model(checkpoint, dtype="float32", ops=PackedOps(), weights=rounding(4))


def test_a_config_says_how_weights_are_kept(checkpoint: Path) -> None:
    def loaded(**settings: Any) -> LoadedModel:
        return load_configured(open_source(checkpoint), EngineConfig(dtype="float32", num_threads=1, **settings))

    assert loaded().rounding is loaded(weights="dense").rounding is None
    assert loaded(weights="int8").rounding == "int8 in groups of 32"
    with pytest.raises(ConfigError, match="a weight's 32 inputs cannot be cut into groups of 64"):
        loaded(weights="int4", weights_group_size=64)
