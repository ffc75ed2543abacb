"""KV statistics in files."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvant.errors import ConfigError, CorruptModelError
from kvant.formats.kv import KVShape
from kvant.quantize.kv_statistics import KVStatistics, LayerStatistics

SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_dim=8)
METADATA = {"kvant_kv_statistics": "1", "tokens": "77"}
NAMES = [field.name for field in fields(LayerStatistics)]


@pytest.fixture
def statistics() -> KVStatistics:
    generator = torch.Generator().manual_seed(0)
    sizes = {"key_mean": (2, 8), "key_variance": (2, 8), "query_moment": (2, 8, 8)}
    layers = [{name: torch.rand(sizes.get(name, (2,)), generator=generator) for name in NAMES} for _ in range(3)]
    return KVStatistics(tuple(LayerStatistics(**layer) for layer in layers), tokens=77)


@pytest.fixture
def path(statistics, tmp_path) -> Path:
    statistics.save(tmp_path / "new" / "kv.safetensors")
    return tmp_path / "new" / "kv.safetensors"


def test_what_is_saved_is_loaded_bit_by_bit(statistics, path):
    found = KVStatistics.load(path, SHAPE)
    assert found.tokens == 77
    assert len(found.layers) == 3
    for layer, original in zip(found.layers, statistics.layers, strict=True):
        assert all(torch.equal(getattr(layer, name), getattr(original, name)) for name in NAMES)


def test_saving_again_replaces_the_file_and_leaves_nothing_beside_it(statistics, path):
    KVStatistics(statistics.layers[::-1], tokens=5).save(path)
    assert KVStatistics.load(path, SHAPE).tokens == 5
    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written(statistics, path):
    with pytest.raises(ConfigError, match="below cannot be written: .*choose another place"):
        statistics.save(path / "below")


def assert_refused(path: Path, says: str, shape: KVShape = SHAPE) -> None:
    with pytest.raises(CorruptModelError, match=says) as refused:
        KVStatistics.load(path, shape)
    assert str(path) in str(refused.value)
    assert "`kvant calibrate MODEL --kv -o DIR`" in str(refused.value)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_file_that_is_not_whole(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    assert_refused(path, "cannot be read from")


def test_a_file_of_another_kind_and_one_that_is_none(path):
    path.write_text("{}")
    assert_refused(path, "cannot be read from")
    assert_refused(path.parent, "cannot be read from")
    assert_refused(path.with_name("absent"), "cannot be read from")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "pt"},
        METADATA | {"kvant_kv_statistics": "2"},
        {"kvant_kv_statistics": "1"},
        METADATA | {"tokens": "-1"},
        METADATA | {"tokens": ""},
    ],
    ids=str,
)
def test_another_version(path, metadata):
    save_file(load_file(path), path, metadata)
    assert_refused(path, "holds no KV statistics that this version of kvant reads")


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (KVShape(2, 2, 8), r"has no key_mean of shape (2, 2, 8)"),
        (KVShape(3, 4, 8), r"has no key_mean of shape (3, 4, 8)"),
        (KVShape(3, 2, 16), r"has no key_mean of shape (3, 2, 16)"),
    ],
)
def test_another_models(path, shape, says):
    assert_refused(path, re.escape(says), shape)


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_is_missing_or_is_not_as_it_should_be(path, name):
    whole = load_file(path)
    good = whole.pop(name)
    for bad in (None, good.half(), good.int(), good[..., :-1].contiguous(), good.unsqueeze(0)):
        save_file(whole if bad is None else whole | {name: bad}, path, METADATA)
        assert_refused(path, rf"has no {name} of shape .* in float32")
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = good.clone()
        bad.view(-1)[-1] = value
        save_file(whole | {name: bad}, path, METADATA)
        assert_refused(path, f"{name} is not finite")


def test_tensors_that_nobody_asked_for_are_left_alone(statistics, path):
    save_file(load_file(path) | {"more": torch.zeros(3)}, path, METADATA)
    assert torch.equal(KVStatistics.load(path, SHAPE).layers[2].key_mean, statistics.layers[2].key_mean)
