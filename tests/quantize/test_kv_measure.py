"""What is measured of a model, against sums over the vectors themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvant.errors import NotFiniteError
from kvant.formats.kv_codecs import hadamard
from kvant.kernels.reference import ReferenceOps
from kvant.models import forcing
from kvant.models.decoder import Decoder
from kvant.quantize.kv_constants import key_shape
from kvant.quantize.kv_measure import measure_kv
from kvant.quantize.kv_statistics import LayerStatistics
from kvant.weights.load import LoadedModel, load_model
from tests.engine.checkpoint import CONFIG, write_checkpoint
from tests.families.configs import TINIES
from tests.families.tiny import build
from tests.support import SingleText

SINKS = 4
WINDOWS = [
    torch.randint(3, 120, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (40, 5, 23)
]


def check(layer: LayerStatistics, q: list[Tensor], k: list[Tensor], rotated: list[Tensor], v: list[Tensor]) -> None:
    """Against each window's vectors, [tokens, heads, head_dim]: queries, keys, keys after RoPE, values."""
    kv_heads = k[0].shape[1]
    for head in range(kv_heads):
        keys = torch.cat([x[SINKS:, head] for x in k]).double()
        group = q[0].shape[1] // kv_heads
        queries = torch.cat([x[SINKS:, head * group : (head + 1) * group].flatten(0, 1) for x in q]).double()
        expected = {
            "key_mean": keys.mean(0),
            "key_variance": keys.var(0, correction=0),
            "query_moment": sum(torch.outer(x, x) for x in queries) / len(queries),
            "key_range": torch.stack([x[:, head].abs().max() for x in rotated]).max(),
            "value_range": torch.stack([x[:, head].abs().max() for x in v]).max(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(getattr(layer, name)[head], value.float(), rtol=1e-3, atol=1e-4, msg=name)
    assert all(x.dtype == torch.float32 for x in vars(layer).values())


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim] after RoPE by complex numbers; cos, sin [tokens, pairs]."""
    half = cos.shape[1]
    pairs = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin).unsqueeze(1)
    return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :]], dim=-1)


def test_one_layer_by_hand(tmp_path):
    """From the weights alone; only this model's first layer is within reach of that."""
    path = write_checkpoint(tmp_path, num_hidden_layers=1)
    weights = {name.removeprefix("model."): x for name, x in load_file(path / "model.safetensors").items()}
    heads, kv_heads, dim = (CONFIG[f"{name}"] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    q, k, v, rotated = [], [], [], []
    for ids in WINDOWS:
        x = weights["embed_tokens.weight"][ids]
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["layers.0.input_layernorm.weight"]
        for kind, count, found in (("q", heads, q), ("k", kv_heads, k), ("v", kv_heads, v)):
            found.append((x @ weights[f"layers.0.self_attn.{kind}_proj.weight"].T).view(-1, count, dim))
        angles = torch.arange(len(ids)).unsqueeze(1) * 10000.0 ** -(torch.arange(0, dim, 2) / dim)
        rotated.append(turned(k[-1], angles.cos(), angles.sin()))
    model = load_model(path, dtype="float32", ops=ReferenceOps())
    [layer] = measure_kv(model.decoder, WINDOWS).layers
    check(layer, q, k, rotated, v)


class Recording(ReferenceOps):
    """Keeps what each layer's attention gets, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, ...]] = []

    def rope_write_kv(self, q: Tensor, k: Tensor, v: Tensor, rotary: Any, cache: Any, batch: Any) -> Tensor:
        after = turned(k.float(), *rotary) if rotary else k
        self.seen.append(tuple(x.float() for x in (q, k, after, v)))
        return super().rope_write_kv(q, k, v, rotary, cache, batch)


def recorded(decoder: Decoder, windows: list[list[int]]) -> list[list[tuple[Tensor, ...]]]:
    """For each window and layer: q, k, k after RoPE, v."""
    found = []
    for ids in windows:
        ops = Recording()
        SingleText(decoder.with_ops(ops), len(ids), len(ids)).feed(ids)
        found.append(ops.seen)
    return found


# Head norms; windows in some layers and soft-caps; RoPE on some elements, stretched, with a factor, by the length.
@pytest.mark.parametrize("name", ["qwen3", "gemma-2", "phi-4-mini", "qwen-v1-partial-rotary", "llama-dynamic"])
@pytest.mark.parametrize("chunk", [256, 7])
def test_every_layer_of_a_family(monkeypatch, families, name, chunk):
    monkeypatch.setattr(forcing, "CHUNK", chunk)
    decoder = families(name).decoder
    found = recorded(decoder, WINDOWS)
    for number, layer in enumerate(measure_kv(decoder, WINDOWS).layers):
        q, k, rotated, v = ([window[number][part] for window in found] for part in range(4))
        check(layer, q, k, rotated, v)
        moments = (layer.key_mean, layer.key_variance, layer.query_moment)
        shape = key_shape(*moments, decoder.spec.layers[number].rope, decoder.spec.max_position)
        centred = [x.transpose(0, 1) - shape.centre.at(torch.arange(len(x))) for x in rotated]
        largest = [hadamard(x * shape.balance.unsqueeze(1)).abs().amax((1, 2)) for x in centred]
        torch.testing.assert_close(layer.shaped_key_range, torch.stack(largest).amax(0), rtol=2**-8, atol=1e-4)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory):
    """Loads a family's miniature, once."""
    loaded: dict[str, LoadedModel] = {}

    def load(name: str) -> LoadedModel:
        if name not in loaded:
            path: Path = build(TINIES[name], tmp_path_factory.mktemp("family") / name).published
            loaded[name] = load_model(path, dtype="float32", ops=ReferenceOps())
        return loaded[name]

    return load


def test_16_bit_models_are_measured_in_float32(tiny_path):
    model = load_model(tiny_path, dtype="bfloat16", ops=ReferenceOps())
    found = recorded(model.decoder, WINDOWS)
    for number, layer in enumerate(measure_kv(model.decoder, WINDOWS).layers):
        keys = torch.cat([window[number][1][SINKS:] for window in found])
        torch.testing.assert_close(layer.key_mean, keys.mean(0), rtol=0.02, atol=0.02)


def test_the_first_tokens_count_for_the_ranges_only(tiny_model):
    """Another first token changes nothing of the first layer's moments, which see only its own key and query."""
    whole, changed = (measure_kv(tiny_model.decoder, [[first, *WINDOWS[0]]]) for first in (7, 200))
    for name in ("key_mean", "key_variance", "query_moment"):
        assert torch.equal(getattr(whole.layers[0], name), getattr(changed.layers[0], name)), name
        assert not torch.equal(getattr(whole.layers[1], name), getattr(changed.layers[1], name)), name
    ranges = [measure_kv(tiny_model.decoder, [[first, *[0] * SINKS]]).layers[0].value_range for first in range(8)]
    assert len({tuple(found.tolist()) for found in ranges}) > 1


def test_progress_and_the_tokens_read(tiny_model):
    told = []
    found = measure_kv(tiny_model.decoder, WINDOWS, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert found.tokens == 40 + 5 + 23


def test_the_model_is_left_as_it_was(tiny_model):
    before = tiny_model.decoder.ops
    first, second = (measure_kv(tiny_model.decoder, WINDOWS) for _ in range(2))
    assert tiny_model.decoder.ops is before
    for one, other in zip(first.layers, second.layers, strict=True):
        assert all(torch.equal(x, vars(other)[name]) for name, x in vars(one).items())


class Overflowing(ReferenceOps):
    """Some columns of the projections of this many outputs are infinite."""

    def __init__(self, outputs: int, columns: slice) -> None:
        super().__init__()
        self._outputs, self._columns = outputs, columns

    def linear(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        y = super().linear(x, weight, bias)
        if y.shape[1] == self._outputs:
            y[:, self._columns] = torch.inf
        return y


@pytest.mark.parametrize("columns", [slice(0, 1), slice(64, 65), slice(96, 97)], ids=["query", "key", "value"])
def test_a_model_that_is_not_finite_is_refused(tmp_path, columns):
    """The last layer's queries go nowhere but into what is measured."""
    model = load_model(write_checkpoint(tmp_path, num_hidden_layers=1), dtype="float32", ops=ReferenceOps())
    with pytest.raises(NotFiniteError, match="not finite.* dtype"):
        measure_kv(model.decoder.with_ops(Overflowing(128, columns)), WINDOWS)
