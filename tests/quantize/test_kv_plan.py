"""Where a plan's constants come from: a named path, what was measured before, or the model itself."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvant import EngineConfig, SamplingParams, pipeline
from kvant.errors import ConfigError, CorruptModelError, KvantError
from kvant.formats.kv import KV_FORMATS, KVPlan, LayerPlan
from kvant.formats.kv_codecs import ShapedCodec, StaticCodec
from kvant.formats.kv_stats import NO_STATS, LayerStats
from kvant.kernels.reference import ReferenceOps
from kvant.quantize import kv_known
from kvant.quantize.kv_constants import layer_plan
from kvant.quantize.kv_measure import measure_kv
from kvant.quantize.kv_plan import plan_kv_cache
from kvant.quantize.kv_statistics import KVStatistics
from kvant.quantize.load import load_configured
from kvant.quantize.scales.files import write_scales
from kvant.quantize.scales.kv_scales import KVScales
from kvant.quantize.texts import cut_windows
from kvant.weights.load import LoadedModel, load_model, open_source
from tests.engine.checkpoint import write_checkpoint

UNMEASURED = [name for name, fmt in KV_FORMATS.items() if not fmt.measured]
KEYS, VALUES = (0.02, 0.5), (0.03, 0.25)  # the steps of the miniature's two layers


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache directory, empty; and a text that is read in no time."""
    monkeypatch.setenv("KVANT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(kv_known, "WINDOWS", 2)
    monkeypatch.setattr(kv_known, "WINDOW_SIZE", 48)
    return tmp_path / "home"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[KVStatistics]:
    """What was measured, each time that it was."""
    found: list[KVStatistics] = []

    def measure(*arguments: Any) -> KVStatistics:
        found.append(measure_kv(*arguments))
        return found[-1]

    monkeypatch.setattr(kv_known, "measure_kv", measure)
    return found


@pytest.fixture(scope="module")
def other(tiny_model: LoadedModel, tokenizer: Any) -> KVStatistics:
    """The miniature's statistics on another text than the bundled one."""
    return measure_kv(tiny_model.decoder, cut_windows("0123456789" * 9, tokenizer, 2, 40))


@pytest.fixture
def plan_of(tiny_model: LoadedModel, tokenizer: Any) -> Any:
    """Plans for the miniature: `plan_of("int4", quantization_param_path=...)`."""

    def plan(name: str, model: LoadedModel = tiny_model, **config: Any) -> KVPlan:
        return plan_kv_cache(EngineConfig(kv_cache_dtype=name, **config), model, tokenizer)

    return plan


def write_policy(path: Path, default: str, **layers: str) -> Path:
    path.write_text(json.dumps({"default": default, "layers": {name[1:]: fmt for name, fmt in layers.items()}}))
    return path


def steps(keys: tuple[float, ...] = KEYS, values: tuple[float, ...] = VALUES, **more: Any) -> KVScales:
    """One step a layer."""
    return KVScales(*(tuple(torch.tensor([step]) for step in side) for side in (keys, values)), **more)


def flat(stats: LayerStats) -> dict[str, torch.Tensor]:
    """The tensors of a layer's constants, by name."""
    parts = {name: value for name, value in vars(stats).items() if value is not None}
    centre = parts.pop("centre", None)
    return parts | ({} if centre is None else vars(centre))


def assert_constants(plan: KVPlan, statistics: KVStatistics, model: LoadedModel) -> None:
    """The plan's layers have what comes of these statistics."""
    for layer, of_layer, spec in zip(plan.layers, statistics.layers, model.spec.layers, strict=True):
        assert_same(layer, layer_plan(layer.format, of_layer, spec.rope))


def assert_same(layer: LayerPlan, expected: LayerPlan) -> None:
    assert layer.format == expected.format
    for found, wanted in ((layer.key_stats, expected.key_stats), (layer.value_stats, expected.value_stats)):
        assert flat(found).keys() == flat(wanted).keys()
        assert all(torch.equal(value, flat(wanted)[name]) for name, value in flat(found).items())


# ---- formats that need nothing


@pytest.mark.parametrize("name", ["auto", *UNMEASURED])
def test_formats_that_need_nothing_touch_neither_the_model_nor_the_tokenizer(tiny_model, home, name):
    untouchable = SimpleNamespace(spec=tiny_model.spec, dtype=torch.float32)  # neither decoder nor source
    plan = plan_kv_cache(EngineConfig(kv_cache_dtype=name), untouchable, None)
    assert plan == KVPlan.uniform(KV_FORMATS["fp16" if name == "auto" else name], 2)
    assert all(layer.key_stats is layer.value_stats is NO_STATS for layer in plan.layers)
    assert not home.exists()


# ---- what was measured before


def test_a_model_is_measured_once(plan_of, tiny_model, measured, home):
    first = plan_of("int4")
    assert_constants(first, measured[0], tiny_model)
    [file] = (home / "kv").iterdir()
    assert file.suffix == ".safetensors"
    for name in ("int4", "int8", "int8_pertensor", "k8v4", "fp8_e4m3"):
        assert_constants(plan_of(name), measured[0], tiny_model)
    assert (len(measured), measured[0].tokens) == (1, 2 * 48)
    assert list((home / "kv").iterdir()) == [file]


def test_it_reads_the_bundled_text_in_its_own_tokens(plan_of, tiny_model, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(kv_known, "measure_kv", lambda _, windows: seen.append(windows) or measure_kv(_, windows))
    plan_of("int8")
    assert "".join(tokenizer.decode(window) for window in seen[0]) == kv_known.calibration_text()[:96]


def test_windows_are_no_longer_than_the_models_context(tmp_path, plan_of, measured):
    path = write_checkpoint(tmp_path / "short", max_position_embeddings=20)
    plan_of("int8", load_model(path, dtype="float32", ops=ReferenceOps()))
    assert measured[0].tokens == 2 * 20


def test_the_bundled_text_is_long_enough_for_any_tokenizer(smollm2):
    """A token of the largest vocabularies has some six letters."""
    assert len(kv_known.calibration_text()) > 10 * 4 * 512


def test_other_files_are_another_model(tmp_path, plan_of, measured):
    path = write_checkpoint(tmp_path / "model")

    def plan() -> int:
        plan_of("int8", load_model(path, dtype="float32", ops=ReferenceOps()))
        return len(measured)

    assert (plan(), plan()) == (1, 1)
    weights = path / "model.safetensors"
    later = weights.stat().st_mtime_ns + 1
    os.utime(weights, ns=(later, later))
    assert (plan(), plan()) == (2, 2)
    before = (path / "config.json").stat()
    write_checkpoint(path, rope_theta=500.0)
    os.utime(weights, ns=(later, later))
    assert (plan(), plan()) == (3, 3)
    (path / "config.json").write_text((path / "config.json").read_text() + " ")
    os.utime(path / "config.json", ns=(before.st_mtime_ns, before.st_mtime_ns))
    assert (plan(), plan()) == (4, 4)


def test_rounded_weights_are_another_model(tmp_path, plan_of, measured):
    path = write_checkpoint(tmp_path / "model", intermediate_size=64)
    for weights, count in (("auto", 1), ("dense", 1), ("int8", 2), ("int8", 2), ("int4", 3)):
        plan_of(
            "int8", load_configured(open_source(path), EngineConfig(dtype="float32", weights=weights, num_threads=1))
        )
        assert len(measured) == count


def test_another_text_or_another_amount_of_it_is_measured_anew(plan_of, measured, monkeypatch):
    plan_of("int8")
    monkeypatch.setattr(kv_known, "WINDOWS", 3)
    plan_of("int8")
    monkeypatch.setattr(kv_known, "calibration_text", lambda: "another text " * 99)
    plan_of("int8")
    assert [found.tokens for found in measured] == [96, 144, 144]


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, None], ids=["empty", "zeros", "version"])
def test_a_damaged_file_is_told_and_measured_again(plan_of, measured, home, caplog, damage):
    plan_of("int8")
    [file] = (home / "kv").iterdir()
    if damage is None:
        save_file(load_file(file), file, {"kvant_kv_statistics": "0", "tokens": "1"})
    else:
        file.write_bytes(damage)
    with caplog.at_level(logging.WARNING, logger="kvant"):
        plan_of("int8")
    assert len(measured) == 2
    assert any(str(file) in message for message in caplog.messages)
    caplog.clear()
    plan_of("int8")
    assert (len(measured), caplog.records) == (2, [])


def test_a_cache_that_cannot_be_written_only_warns(plan_of, tiny_model, measured, home, caplog):
    home.write_text("no directory")
    with caplog.at_level(logging.WARNING, logger="kvant"):
        assert_constants(plan_of("int8"), measured[0], tiny_model)
    assert "cannot be kept, and will be measured again next time" in caplog.messages[-1]
    plan_of("int8")
    assert len(measured) == 2


# ---- statistics at a path


@pytest.mark.parametrize("named", ["", "kv_statistics.safetensors"])
def test_statistics_at_a_path_are_used_and_nothing_is_measured(
    plan_of, tiny_model, other, measured, home, tmp_path, named
):
    other.save(tmp_path / "dir" / "kv_statistics.safetensors")
    write_scales(tmp_path / "dir", steps(), "vllm")  # as `kvant calibrate` does; they are for other tools
    for name in ("int4", "int8", "int8_pertensor", "k8v4"):
        path = tmp_path / "dir" / named if named else tmp_path / "dir"
        assert_constants(plan_of(name, quantization_param_path=path), other, tiny_model)
        assert_constants(plan_of(name, quantization_param_path=str(path)), other, tiny_model)
    assert measured == []
    assert not home.exists()
    assert not torch.equal(other.layers[0].key_mean, measure(plan_of, measured).layers[0].key_mean)


def measure(plan_of: Any, measured: list[KVStatistics]) -> KVStatistics:
    plan_of("int8")
    return measured[0]


def test_statistics_of_another_model_are_refused(plan_of, other, tmp_path):
    file = tmp_path / "kv_statistics.safetensors"
    KVStatistics(other.layers[:1], other.tokens).save(file)
    with pytest.raises(CorruptModelError, match="has no key_mean of shape .* another model's") as refused:
        plan_of("int4", quantization_param_path=tmp_path)
    assert str(file) in str(refused.value)


# ---- static scales at a path


def static(layer: LayerPlan) -> tuple[list[float], list[float]]:
    """The scales of a layer that stores keys as they are."""
    assert isinstance(layer.format.key, StaticCodec)
    assert layer.key_stats.centre is layer.key_stats.balance is layer.value_stats.centre is None
    assert layer.key_stats.scale.dtype == layer.value_stats.scale.dtype == torch.float32
    return layer.key_stats.scale.tolist(), layer.value_stats.scale.tolist()


def test_own_constants_are_centred_and_given_scales_are_not(plan_of, tiny_model, measured, tmp_path):
    write_scales(tmp_path, steps(), "vllm")
    given = plan_of("int8_pertensor", quantization_param_path=tmp_path / "kv_cache_scales.json")
    assert measured == []
    own = plan_of("int8_pertensor")
    keys = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(0))
    for layer, mine in zip(given.layers, own.layers, strict=True):
        static(layer)
        codes = layer.format.key.encode(keys, torch.arange(50), layer.key_stats)["codes"]
        assert torch.equal(codes, (keys / layer.key_stats.scale[0]).round().clamp(-127, 127).to(torch.int8))
        assert isinstance(mine.format.key, ShapedCodec)
        assert mine.key_stats.centre is not None
    assert given.name == own.name == "int8_pertensor"
    assert given.bytes_per_token(tiny_model.spec.kv_shape) == own.bytes_per_token(tiny_model.spec.kv_shape)


@pytest.mark.parametrize("name", ["int8_pertensor", "int8_pertensor_perhead", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("form", ["file", "directory"])
def test_a_file_that_does_not_tell_its_codes_is_taken_at_its_word(plan_of, tmp_path, name, form):
    write_scales(tmp_path, steps(), "vllm")  # the larger step serves both sides
    path = tmp_path / "kv_cache_scales.json" if form == "file" else tmp_path
    first, second = plan_of(name, quantization_param_path=path).layers
    for layer, step in ((first, 0.03), (second, 0.5)):
        for side in static(layer):
            assert side == pytest.approx([step, step])


@pytest.mark.parametrize(
    ("name", "codes", "factor"),
    [
        ("int8_pertensor", "int8", 1),
        ("int8_pertensor", "fp8", 448 / 127),
        ("int8_pertensor_perhead", "fp8", 448 / 127),
        ("fp8_e4m3", "fp8", 1),
        ("fp8_e4m3", "int8", 127 / 448),
        ("fp8_e5m2", "fp8", 448 / 57344),
    ],
)
@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_scales_for_other_codes_reach_as_far(plan_of, tmp_path, name, codes, factor, layout):
    write_scales(tmp_path, steps(codes=codes), layout)
    if layout == "compressed-tensors":  # as its checkpoints have it
        (tmp_path / "kv_cache_scheme.json").rename(tmp_path / "config.json")
    plan = plan_of(name, quantization_param_path=tmp_path)
    for layer, key, value in zip(plan.layers, KEYS, VALUES, strict=True):
        keys, values = static(layer)
        assert keys == pytest.approx([key * factor] * 2)
        assert values == pytest.approx([value * factor] * 2)


@pytest.mark.parametrize(
    ("name", "keys"), [("int8_pertensor", [0.4, 0.4]), ("int8_pertensor_perhead", [0.1, 0.4]), ("fp8_e4m3", [0.4, 0.4])]
)
def test_scales_of_heads_in_a_format_with_one_a_layer(plan_of, tmp_path, name, keys):
    step = (torch.tensor([0.1, 0.4]), torch.tensor([0.1, 0.4]))
    write_scales(tmp_path, KVScales(step, step), "vllm")
    for layer in plan_of(name, quantization_param_path=tmp_path).layers:
        assert static(layer) == (pytest.approx(keys), pytest.approx(keys))


# ---- layers of several formats


def test_each_layer_of_a_mixed_plan_has_what_it_needs(plan_of, tiny_model, other, measured, tmp_path):
    policy = write_policy(tmp_path / "policy.json", "int4", _0="int8_pertensor")
    own = plan_of("auto", kv_cache_policy=policy)
    assert [layer.format.name for layer in own.layers] == ["int8_pertensor", "int4"]
    assert_constants(own, measured[0], tiny_model)
    other.save(tmp_path / "dir" / "kv_statistics.safetensors")
    assert_constants(
        plan_of("auto", kv_cache_policy=policy, quantization_param_path=tmp_path / "dir"), other, tiny_model
    )


def test_scales_serve_the_static_layers_and_the_others_are_measured(plan_of, tiny_model, measured, tmp_path):
    policy = write_policy(tmp_path / "policy.json", "int4", _0="int8_pertensor")
    write_scales(tmp_path, steps(), "vllm")
    plan = plan_of("auto", kv_cache_policy=policy, quantization_param_path=tmp_path / "kv_cache_scales.json")
    assert static(plan.layers[0])[0] == pytest.approx([0.03, 0.03])
    [statistics] = measured
    expected = layer_plan(KV_FORMATS["int4"], statistics.layers[1], tiny_model.spec.layers[1].rope)
    assert_same(plan.layers[1], expected)


def test_layers_that_need_nothing_are_not_measured_for(plan_of, measured, tmp_path):
    write_scales(tmp_path, steps(), "vllm")
    config = {"kv_cache_dtype_skip_layers": "0", "quantization_param_path": tmp_path}
    first, second = plan_of("fp8", **config).layers
    assert (first, measured) == (LayerPlan(KV_FORMATS["fp16"]), [])
    assert static(second)[0] == pytest.approx([0.5, 0.5])
    first, second = plan_of("int8", kv_cache_dtype_skip_layers="0").layers
    assert (first, len(measured)) == (LayerPlan(KV_FORMATS["fp16"]), 1)
    assert second.key_stats.centre is not None


# ---- what cannot be


@pytest.mark.parametrize("name", ["auto", "fp16", "int8_plain", "int8_pertoken"])
def test_a_path_is_of_no_use_where_nothing_is_measured(plan_of, other, tmp_path, name):
    other.save(tmp_path / "kv_statistics.safetensors")
    with pytest.raises(ConfigError, match="is of no use to (fp16|int8_plain|int8_pertoken); leave it out"):
        plan_of(name, quantization_param_path=tmp_path)


@pytest.mark.parametrize("name", ["int4", "int8", "k8v4"])
def test_static_scales_are_of_no_use_to_formats_that_measure_more(plan_of, measured, tmp_path, name):
    write_scales(tmp_path, steps(), "vllm")
    for path in (tmp_path, tmp_path / "kv_cache_scales.json"):
        with pytest.raises(
            ConfigError, match=rf"is or has no kv_statistics.safetensors, and {name} does not use static"
        ):
            plan_of(name, quantization_param_path=path)
    assert measured == []


@pytest.mark.parametrize("name", ["int4", "int8_pertensor"])
def test_a_path_that_leads_nowhere(plan_of, tmp_path, name):
    with pytest.raises(ConfigError, match="absent' does not exist"):
        plan_of(name, quantization_param_path=tmp_path / "absent")


@pytest.mark.parametrize(
    ("keys", "says"), [((0.1,), "has scales for 1 layers, the model has 2"), ((0.1,) * 3, "for 3 layers")]
)
def test_scales_of_another_model_are_refused(plan_of, tmp_path, keys, says):
    write_scales(tmp_path, steps(keys, keys), "vllm")
    with pytest.raises(CorruptModelError, match=says):
        plan_of("int8_pertensor", quantization_param_path=tmp_path)


def test_a_directory_without_scales(plan_of, tmp_path):
    with pytest.raises(KvantError, match="holds no static KV scales"):
        plan_of("int8_pertensor", quantization_param_path=tmp_path)


# ---- an engine


def test_a_pipeline_with_measured_formats(tiny_path, other, home, measured, tmp_path):
    """It measures once, answers the same each time, and foresees the prompt nearly as an exact cache does."""
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=0)
    prompt = "The state of the Union is strong, and so are we."

    def answer(name: str, **config: Any) -> torch.Tensor:
        config |= {"dtype": "float32", "max_model_len": 256, "enable_prefix_caching": False}
        with pipeline(tiny_path, engine=EngineConfig(kv_cache_dtype=name, **config)) as pipe:
            assert pipe.memory.describe().startswith(f"KV cache {name}")
            one, again = (pipe(prompt, sampling) for _ in range(2))
        assert one.token_ids == again.token_ids
        assert len(one.token_ids) == 8
        return torch.tensor([token.logprob for token in one.prompt_logprobs if token])

    exact, int8, int4, plain = (answer(name) for name in ("fp32", "int8", "int4", "int4_plain"))
    assert len(measured) == len(list((home / "kv").iterdir())) == 1
    other.save(tmp_path / "kv_statistics.safetensors")
    named = answer("int4", quantization_param_path=tmp_path)
    assert len(measured) == 1
    off = {name: float((x - exact).abs().mean()) for name, x in (("int8", int8), ("int4", int4), ("plain", plain))}
    assert 0 < off["int8"] < 0.2 * off["int4"]
    assert off["int4"] < off["plain"]
    assert 0 < (named - int4).abs().mean() < 2 * off["int4"]
