"""Formats by layer: what a config and its policy file make of a model, and an engine that runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from kvant.config import EngineConfig, SamplingParams
from kvant.engine.core import Core
from kvant.errors import ConfigError
from kvant.formats.kv import KV_FORMATS, KVPlan
from kvant.kernels.reference import ReferenceOps
from kvant.models.spec import LayerSpec, ModelSpec
from kvant.quantize.kv_policy import resolve_layer_formats
from kvant.weights.load import LoadedModel, load_model
from tests.engine.checkpoint import write_checkpoint
from tests.engine.drive import Ask, assert_same, drive, text

WINDOW = 19


def spec_of(*windows: int | None) -> ModelSpec:
    """A spec whose layers have these windows, 2 KV heads of 16."""
    layers = tuple(LayerSpec(rope=None, window=window) for window in windows)
    return ModelSpec("tiny", 100, 64, 64, 4, 2, 16, layers, max_position=512, attention_scale=0.25)


FOUR = spec_of(None, None, None, None)
WINDOWED = spec_of(WINDOW, None, WINDOW, None)


def plan_of(spec: ModelSpec, dtype: torch.dtype = torch.float32, **config: Any) -> KVPlan:
    return resolve_layer_formats(EngineConfig(**config), spec, dtype)


def formats(plan: KVPlan) -> list[str]:
    return [layer.format.name for layer in plan.layers]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """Writes a policy, or a text as it stands, and tells where it is."""
    path = tmp_path_factory.mktemp("policies") / "policy.json"

    def write(content: Any) -> Path:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_without_wishes_every_layer_has_the_same_format():
    for name in KV_FORMATS:
        assert plan_of(FOUR, kv_cache_dtype=name) == KVPlan.uniform(KV_FORMATS[name], 4)
    assert plan_of(FOUR, torch.bfloat16).name == "bf16"


@pytest.mark.parametrize(
    ("skip", "expected", "name"),
    [
        ("0,-1", ["fp16", "int4", "int4", "fp16"], "int4 (layers 0, 3: fp16)"),
        ("1-2", ["int4", "fp16", "fp16", "int4"], "int4 (layers 1-2: fp16)"),
        ("-2--1", ["int4", "int4", "fp16", "fp16"], "int4 (layers 2-3: fp16)"),
        ("2--1,2", ["int4", "int4", "fp16", "fp16"], "int4 (layers 2-3: fp16)"),
        ("3", ["int4", "int4", "int4", "fp16"], "int4 (layer 3: fp16)"),
        ("sliding_window", ["fp16", "int4", "fp16", "int4"], "int4 (layers 0, 2: fp16)"),
        ("sliding_window,1,3", ["fp16"] * 4, "fp16"),
    ],
)
def test_skipped_layers_keep_16_bit(skip, expected, name):
    plan = plan_of(WINDOWED, kv_cache_dtype="int4", kv_cache_dtype_skip_layers=skip)
    assert (formats(plan), plan.name) == (expected, name)
    wide = plan_of(WINDOWED, torch.bfloat16, kv_cache_dtype="int4", kv_cache_dtype_skip_layers=skip)
    assert formats(wide) == [fmt.replace("fp16", "bf16") for fmt in expected]


def test_a_policy_gives_layers_formats_of_their_own(policy):
    layers = {"0": "int8", "20-23": "fp16", "-1": "fp16", "sliding_window": "bf16"}
    path = policy({"default": "int4", "layers": layers})
    plan = plan_of(spec_of(*[None] * 5, WINDOW, *[None] * 18), kv_cache_policy=path)
    assert formats(plan) == ["int8", *["int4"] * 4, "bf16", *["int4"] * 14, *["fp16"] * 4]
    assert plan.name == "int4 (layer 0: int8; layer 5: bf16; layers 20-23: fp16)"


def test_an_index_comes_before_sliding_window_wherever_it_is_written(policy):
    path = policy({"layers": {"sliding_window": "int8"}})
    plan = plan_of(WINDOWED, kv_cache_dtype="int4", kv_cache_policy=path, kv_cache_dtype_skip_layers=(0,))
    assert formats(plan) == ["fp16", "int4", "int8", "int4"]
    path = policy({"layers": {"0-1": "int8"}})
    plan = plan_of(WINDOWED, kv_cache_dtype="int4", kv_cache_policy=path, kv_cache_dtype_skip_layers="sliding_window")
    assert formats(plan) == ["int8", "int8", "fp16", "int4"]


def test_the_name_begins_with_what_most_layers_have_where_none_has_the_default(policy):
    path = policy({"layers": {"0": "int8", "1-3": "fp32"}})
    assert plan_of(FOUR, kv_cache_dtype="int4", kv_cache_policy=path).name == "fp32 (layer 0: int8)"


def test_the_default_of_a_policy_and_the_flag_must_not_contradict_each_other(policy):
    path = policy({"default": "int4"})
    assert plan_of(FOUR, kv_cache_policy=path).name == "int4"
    assert plan_of(FOUR, kv_cache_policy=path, kv_cache_dtype="int4").name == "int4"
    with pytest.raises(ConfigError, match="default 'int4' contradicts kv_cache_dtype='int8'; leave one of them out"):
        plan_of(FOUR, kv_cache_policy=path, kv_cache_dtype="int8")
    with pytest.raises(ConfigError, match="default 'int4' contradicts kv_cache_dtype='int8'"):
        plan_of(FOUR, kv_cache_policy=path, quant_policy=8)
    assert plan_of(FOUR, kv_cache_policy=policy({}), kv_cache_dtype="int8").name == "int8"
    assert plan_of(FOUR, kv_cache_policy=policy({"default": "float16"}), kv_cache_dtype="fp16").name == "fp16"


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("{", "is not valid JSON: .*; write it like {"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "must hold an object, and so must its layers"),
        ({"layers": ["0"]}, "must hold an object, and so must its layers"),
        ({"layers": None}, "must hold an object, and so must its layers"),
        ({"layer": {}}, "'layer' is no key of a policy; it has default and layers"),
        ('{"layers": {"0": "int8", "0": "fp16"}}', "is not valid JSON: '0' is there twice"),
        ({"default": 4}, "default: 4 is no name of a format"),
        ({"default": "int3"}, "default: .*'int3' is unknown; choose one of"),
        ({"layers": {"0": 8}}, "layers: '0': 8 is no name of a format; write one in quotes"),
        ({"layers": {"0": "int3"}}, "layers: '0': .*'int3' is unknown; choose one of auto, .*int8"),
        ({"layers": {"first": "int8"}}, "layers: 'first' names no layers; write an index"),
        ({"layers": {"4": "int8"}}, "layers: '4': there is no layer 4; this model has layers 0 to 3"),
        ({"layers": {"-5": "int8"}}, "layers: '-5': there is no layer -5; this model has layers 0 to 3"),
        ({"layers": {"2-9": "int8"}}, "layers: '2-9': there is no layer 9"),
        ({"layers": {"3-1": "int8"}}, "layers: '3-1': layer 3 comes after layer 1; write the range from low to high"),
        ({"layers": {"-1-0": "int8"}}, "layers: '-1-0': layer 3 comes after layer 0"),
        ({"layers": {"sliding_window": "int8"}}, "layers: 'sliding_window': no layer of this model has a window"),
        (
            {"layers": {"0-2": "int8", "-3": "fp16"}},
            r"layers: '-3' \(fp16\) and .*layers: '0-2' \(int8\) give layer 1 different formats; leave one",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_policy_names_the_file_the_entry_and_the_remedy(policy, written, complaint):
    path = policy(written)
    with pytest.raises(ConfigError, match=f"^kv_cache_policy: {path}:? {complaint}"):
        plan_of(FOUR, kv_cache_policy=path)


def test_a_policy_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.json").write_bytes(b'{"default": "\xe9"}')
    for name in ("absent.json", ".", "latin.json", "\0"):
        with pytest.raises(ConfigError, match="^kv_cache_policy: .* cannot be read: .*; give a file with {"):
            plan_of(FOUR, kv_cache_policy=tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        plan_of(FOUR, kv_cache_policy="~nobody-is-called-so/policy.json")


@pytest.mark.parametrize(
    ("skip", "complaint"),
    [
        ("4", "4: there is no layer 4; this model has layers 0 to 3"),
        ("2-1", "'2-1': layer 2 comes after layer 1"),
        ("sliding_window", "'sliding_window': no layer of this model has a window; leave it out"),
    ],
)
def test_layers_that_cannot_be_skipped(skip, complaint):
    with pytest.raises(ConfigError, match=f"^kv_cache_dtype_skip_layers: {complaint}"):
        plan_of(FOUR, kv_cache_dtype="int4", kv_cache_dtype_skip_layers=skip)


def test_skipping_and_a_policy_must_not_contradict_each_other(policy):
    path = policy({"layers": {"0-1": "int8", "sliding_window": "int8"}})
    for skip, layer in (("1", 1), ("sliding_window", 0)):
        with pytest.raises(
            ConfigError, match=rf"layers: .* \(int8\) and .*skip_layers: .* \(fp16\) give layer {layer}"
        ):
            plan_of(WINDOWED, kv_cache_policy=path, kv_cache_dtype_skip_layers=skip)
    path = policy({"layers": {"0-1": "auto"}})
    assert formats(plan_of(FOUR, kv_cache_dtype="int4", kv_cache_policy=path, kv_cache_dtype_skip_layers="1-2")) == [
        *("fp16", "fp16", "fp16", "int4")
    ]


@st.composite
def layer_entries(draw: st.DrawFn, windows: list[int | None]) -> tuple[str, set[int]]:
    """An entry of a layer list, and the layers it stands for."""
    count = len(windows)
    first, last = sorted(draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=2)))
    start, end = (draw(st.sampled_from((layer, layer - count))) for layer in (first, last))
    with_window = {layer for layer, window in enumerate(windows) if window is not None}
    choices = [(str(start), {first}), (f"{start}-{end}", set(range(first, last + 1)))]
    return draw(st.sampled_from([*choices, ("sliding_window", with_window)] if with_window else choices))


@given(windows=st.lists(st.sampled_from((None, WINDOW)), min_size=1, max_size=6), data=st.data())
def test_any_policy_means_what_a_dictionary_says(policy, windows, data):
    names = st.sampled_from(("fp32", "fp16", "int8", "int4"))
    skips = dict(data.draw(st.lists(layer_entries(windows), max_size=2)))
    entries = dict(data.draw(st.lists(layer_entries(windows), max_size=3)))
    wished = {entry: data.draw(names) for entry in entries}
    default = data.draw(names)

    wishes = [(entry, skips[entry], "fp16") for entry in skips]
    wishes += [(entry, entries[entry], wished[entry]) for entry in entries]
    expected: list[str] = []
    contradiction = False
    for layer in range(len(windows)):
        by_index = {name for entry, layers, name in wishes if layer in layers and entry != "sliding_window"}
        by_window = {name for entry, layers, name in wishes if layer in layers and entry == "sliding_window"}
        contradiction |= max(len(by_index), len(by_window)) > 1
        expected.append(min(by_index or by_window or {default}))

    path = policy({"default": default, "layers": wished})
    config = EngineConfig(kv_cache_policy=path, kv_cache_dtype_skip_layers=tuple(skips))
    spec = spec_of(*windows)
    if contradiction:
        with pytest.raises(ConfigError, match=r"give layer \d different formats"):
            resolve_layer_formats(config, spec, torch.float32)
    else:
        plan = resolve_layer_formats(config, spec, torch.float32)
        assert formats(plan) == expected
        assert plan.bytes_per_token(spec.kv_shape) == sum(
            KV_FORMATS[name].bytes_per_token(replace(spec.kv_shape, num_layers=1)) for name in expected
        )
        assert all(name in plan.name for name in expected)


def test_bytes_per_token_are_the_layers_sum(policy):
    path = policy({"default": "fp32", "layers": {"0": "fp16", "-1": "bf16"}})
    plan = plan_of(spec_of(None, None, None, None, None), kv_cache_policy=path)
    # Two KV heads, a key and a value each, 16 elements: 64 elements a layer.
    assert plan.bytes_per_token(WINDOWED.kv_shape) == 64 * (2 + 4 + 4 + 4 + 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """Four layers, of which the first and the third have windows."""
    types = ["sliding_attention", "full_attention"] * 2
    window = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}
    directory = tmp_path_factory.mktemp("tiny")
    return load_model(
        write_checkpoint(directory, num_hidden_layers=4, layer_types=types, **window),
        dtype="float32",
        ops=ReferenceOps(),
    )


def core_with(model: LoadedModel, **config: Any) -> Core:
    settings = EngineConfig(max_model_len=192, block_size=32, num_kv_blocks=40, **config)
    return Core(model, settings, kv=resolve_layer_formats(settings, model.spec, model.dtype))


def asks() -> list[Ask]:
    """One prompt, another that begins alike, and the first again with more choices."""
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    shared = text(1, 60)
    return [(shared, greedy), (shared[:37] + text(2, 9), greedy), (shared, SamplingParams(n=2, seed=3, max_tokens=12))]


def test_an_engine_runs_a_mixed_plan_the_same_with_hits_and_with_misses(tiny, policy):
    path = policy({"default": "int4", "layers": {"1": "int8", "sliding_window": "fp32"}})
    config = {"kv_cache_policy": path, "kv_cache_dtype_skip_layers": (-1,)}
    core = core_with(tiny, **config)
    assert [layer.format.name for layer in core.store.layers] == ["fp32", "int8", "fp32", "fp16"]
    assert sum(plane.nbytes for layer in core.store.layers for plane in layer.planes.values()) == core.memory.pool_bytes
    misses = [drive(core_with(tiny, enable_prefix_caching=False, **config), [ask]) for ask in asks()]
    for _ in range(2):
        for ask, miss in zip(asks(), misses, strict=True):
            hit = drive(core, [ask])
            assert_same(hit, miss)
    assert hit.requests[0].cached_tokens == 59
    assert misses[0].requests[0].cached_tokens == 0


def keys_of_a_prompt(model: LoadedModel, **config: Any) -> list[Tensor]:
    """What each layer of an engine gives back of a prompt's keys: [kv_heads, tokens, head_dim]."""
    core = core_with(model, **config)
    prompt = text(1, 56)
    drive(core, [(prompt, SamplingParams(max_tokens=1))])
    blocks = torch.arange(core.store.paging.blocks_for(len(prompt)))  # a new pool gives them in order
    return [layer.read("key", blocks)[:, : len(prompt)] for layer in core.store.layers]


def test_each_layer_of_a_mixed_plan_works_in_its_own_format(tiny):
    skip = {"kv_cache_dtype_skip_layers": "sliding_window"}
    exact, mixed = (keys_of_a_prompt(tiny, kv_cache_dtype=name, **skip) for name in ("fp32", "int4"))
    errors = [float((got - true).norm() / true.norm()) for got, true in zip(mixed, exact, strict=True)]
    assert errors[0] == 0  # both keep the first layer, which no other layer's format reaches, in 16 bit
    assert 0.02 < errors[1] < 0.2
