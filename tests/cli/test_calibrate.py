"""`kvant calibrate` with a miniature model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from kvant.cli.calibrate import CodesName, LayoutName
from kvant.config import EngineConfig
from kvant.errors import NotFiniteError
from kvant.kernels.reference import ReferenceOps
from kvant.quantize import kv_calibrate
from kvant.quantize.kv_calibrate import ScaleFiles
from kvant.quantize.kv_constants import layer_plan
from kvant.quantize.kv_known import WINDOW_SIZE, WINDOWS
from kvant.quantize.kv_measure import measure_kv
from kvant.quantize.kv_plan import plan_kv_cache
from kvant.quantize.kv_statistics import KVStatistics, LayerStatistics
from kvant.quantize.scales.files import Layout, read_scales
from kvant.quantize.scales.kv_scales import Codes
from kvant.quantize.texts import calibration_text, cut_windows
from kvant.weights.load import LoadedModel, inspect_model, load_model
from kvant.weights.tokenizer import read_tokenizer
from tests.engine.checkpoint import write_checkpoint

TEXT = Path(__file__).parents[1] / "data" / "truman_1945.txt"
SMALL = ("--kv", "--calib", str(TEXT), "--samples", "2", "--seqlen", "48")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(tiny: Path) -> LoadedModel:
    return load_model(tiny, dtype="float32", ops=ReferenceOps())


@pytest.fixture(scope="module")
def expected(model: LoadedModel) -> KVStatistics:
    """What is to be measured with the flags of SMALL."""
    tokenizer = read_tokenizer(model.source)
    return measure_kv(model.decoder, cut_windows(TEXT.read_text(encoding="utf-8"), tokenizer, 2, 48))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was asked of a calibration, which pretends to have measured keys that are mostly mean in some layers."""
    calls: dict[str, Any] = {}

    def calibrate(model: Any, directory: Path, **options: Any) -> KVStatistics:
        calls.update(options, model=model, directory=directory)
        return KVStatistics(tuple(layer_with(share) for share in calls.get("shares", (0.5, 0.96, 0.3, 0.999))), 1)

    monkeypatch.setattr(kv_calibrate, "calibrate_kv", calibrate)
    return calls


def layer_with(share: float) -> LayerStatistics:
    """A layer of whose keys' energy this share is common to all."""
    common, ones = torch.full((2, 8), share**0.5), torch.ones(2)
    return LayerStatistics(common, torch.full((2, 8), 1 - share), torch.zeros(2, 8, 8), ones, ones, ones)


def same(one: KVStatistics, other: KVStatistics) -> bool:
    pairs = zip(one.layers, other.layers, strict=True)
    return one.tokens == other.tokens and all(
        torch.equal(value, vars(second)[name]) for first, second in pairs for name, value in vars(first).items()
    )


def test_what_is_written_and_what_is_said(kvant, tiny, model, expected, tmp_path):
    out = tmp_path / "new" / "out"
    result = kvant("calibrate", str(tiny), *SMALL, "-o", str(out))
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert sorted(path.name for path in out.iterdir()) == ["kv_cache_scales.json", "kv_statistics.safetensors"]
    assert same(KVStatistics.load(out / "kv_statistics.safetensors", model.spec.kv_shape), expected)
    document = json.loads((out / "kv_cache_scales.json").read_text())
    assert document["model_type"] == "llama"
    assert document["kv_cache"]["scaling_factor"] == {
        "0": {
            str(number): pytest.approx(float(torch.maximum(layer.key_range.max(), layer.value_range.max())) / 127)
            for number, layer in enumerate(expected.layers)
        }
    }
    for said in (f"written to {out}:", "kv_statistics.safetensors", "kv_cache_scales.json", "int8 codes", "each layer"):
        assert said in result.stdout
    assert f"--kv-cache-dtype int4 --quantization-param-path {out}" in result.stdout
    assert "keys: their mean has " in result.stdout


def test_an_engine_works_with_what_was_written(kvant, tiny, model, expected, tmp_path):
    assert kvant("calibrate", str(tiny), *SMALL, "-o", str(tmp_path)).exit_code == 0
    config = EngineConfig(kv_cache_dtype="int4", quantization_param_path=tmp_path)
    plan = plan_kv_cache(config, model, read_tokenizer(model.source))
    for layer, statistics, spec in zip(plan.layers, expected.layers, model.spec.layers, strict=True):
        wanted = layer_plan(layer.format, statistics, spec.rope)
        assert torch.equal(layer.key_stats.feedback, wanted.key_stats.feedback)
        assert torch.equal(layer.key_stats.centre.coefficients, wanted.key_stats.centre.coefficients)


@pytest.mark.parametrize("codes", get_args(Codes))
@pytest.mark.parametrize("layout", get_args(get_args(Layout)[1]))
def test_scales_as_tensors(kvant, tiny, expected, tmp_path, layout, codes):
    out = tmp_path / "out"
    result = kvant("calibrate", str(tiny), *SMALL, "-o", str(out), "--layout", layout, "--codes", codes)
    assert result.exit_code == 0, result.output
    assert not (out / "kv_cache_scales.json").exists()
    scales = read_scales(out, 2, 2)
    for key, value, layer in zip(scales.keys, scales.values, expected.layers, strict=True):
        largest = {"int8": 127, "fp8": 448}[codes]
        ranges = [float(layer.key_range.max()), float(layer.value_range.max())]
        ranges = [max(ranges)] * 2 if layout == "fused" else ranges
        assert [*key.tolist(), *value.tolist()] == pytest.approx([x / largest for x in ranges])
    assert scales.codes == codes
    assert f"{codes} codes" in result.stdout


def test_a_scale_for_each_head_and_several_layouts(kvant, tiny, expected, tmp_path):
    layouts = ("--layout", "compressed-tensors", "--layout", "vllm", "--layout", "vllm")
    result = kvant("calibrate", str(tiny), *SMALL, "-o", str(tmp_path), *layouts, "--per-head", "--tp-size", "2")
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == {
        *("kv_statistics.safetensors", "kv_cache_scales.json", "kv_scales.safetensors", "kv_cache_scheme.json")
    }
    for key, layer in zip(read_scales(tmp_path, 2, 2).keys, expected.layers, strict=True):
        torch.testing.assert_close(key, layer.key_range / 127)
    factors = json.loads((tmp_path / "kv_cache_scales.json").read_text())["kv_cache"]["scaling_factor"]
    for number, layer in enumerate(expected.layers):
        shared = torch.maximum(layer.key_range, layer.value_range) / 127
        assert [factors[rank][str(number)] for rank in ("0", "1")] == [
            pytest.approx([step]) for step in shared.tolist()
        ]
    assert "one for each KV head" in result.stdout
    assert result.stdout.count("kv_cache_scales.json") == 1


def test_without_flags_it_is_the_text_and_the_amount_that_kvant_measures_by_itself(kvant, model, tiny, tmp_path):
    assert kvant("calibrate", str(tiny), "--kv", "-o", str(tmp_path)).exit_code == 0
    windows = cut_windows(calibration_text(), read_tokenizer(model.source), WINDOWS, WINDOW_SIZE)
    found = KVStatistics.load(tmp_path / "kv_statistics.safetensors", model.spec.kv_shape)
    assert same(found, measure_kv(model.decoder, windows))


def test_a_short_context_shortens_what_is_read(kvant, tmp_path):
    path = write_checkpoint(tmp_path / "model", max_position_embeddings=20)
    assert kvant("calibrate", str(path), "--kv", "-o", str(tmp_path)).exit_code == 0
    shape = inspect_model(path).kv_shape
    assert KVStatistics.load(tmp_path / "kv_statistics.safetensors", shape).tokens == 4 * 20


def test_the_models_own_directory_may_take_the_files(kvant, tmp_path):
    path = write_checkpoint(tmp_path)
    layouts = ("--layout", "vllm", "--layout", "compressed-tensors")
    for _ in range(2):
        result = kvant("calibrate", str(path), *SMALL, "-o", str(path), *layouts)
        assert result.exit_code == 0, result.output
    assert load_model(path, dtype="float32", ops=ReferenceOps()).spec.num_kv_heads == 2


def test_every_flag_arrives(kvant, asked):
    flags = "--calib a.txt --samples 3 --seqlen 99 --codes fp8 --layout fused --layout vllm --per-tensor --tp-size 2"
    flags += " --dtype bfloat16 --weights int8 --weights-group-size 128 --threads 1 --device cpu"
    result = kvant("calibrate", "some", "--kv", "-o", "out", *flags.split())
    assert result.exit_code == 0, result.output
    del asked["progress"]
    assert asked == {
        "model": "some",
        "directory": Path("out"),
        "engine": EngineConfig(dtype="bfloat16", weights="int8", weights_group_size=128, num_threads=1, device="cpu"),
        "text": Path("a.txt"),
        "samples": 3,
        "seqlen": 99,
        "scales": ScaleFiles(layouts=("fused", "vllm"), codes="fp8", per_head=False, tp_size=2),
    }


def test_the_defaults(kvant, asked):
    assert kvant("calibrate", "--kv", env={"KVANT_OUTPUT_DIR": "out"}).exit_code == 0
    del asked["progress"]
    assert asked == {
        "model": None,
        "directory": Path("out"),
        "engine": EngineConfig(),
        "text": None,
        "samples": WINDOWS,
        "seqlen": None,
        "scales": ScaleFiles(layouts=("vllm",), codes="int8", per_head=False, tp_size=1),
    }


def test_it_tells_what_keys_have_in_common(kvant, asked):
    said = kvant("calibrate", "--kv", "-o", "out").stdout
    assert said.endswith("keys: their mean has 73.0% of their energy in the median layer, 99.9% in layer 3\n")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_calibrate, "load_configured", lambda *_, **__: pytest.fail("the weights were read"))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--calib", "/nowhere/a.txt"], "the text /nowhere/a.txt cannot be read: No such file or directory"),
        (["--samples", "9999"], "the text has "),
        (["--samples", "0"], "samples=0 must be at least 1"),
        (["--seqlen", "4"], "seqlen=4 must be from 5, since a text's first 4 tokens are left out, to 512"),
        (["--seqlen", "513"], "seqlen=513 must be from 5"),
        (["--layout", "modelopt", "--layout", "fused"], "the layouts modelopt and fused would both be kv_scales"),
        (["--layout", "modelopt", "--per-head"], "the layout 'modelopt' holds one scale a layer"),
        (["--per-head", "--tp-size", "3"], "2 KV heads cannot be split over a tensor-parallel size of 3"),
        (["--layout", "modelopt", "--tp-size", "2"], "tp_size=2: only the layout 'vllm' tells ranks apart"),
        (["--dtype", "int3"], "dtype='int3' is unknown"),
        (["-o", str(TEXT)], f"{TEXT}: no files can be written in {TEXT}"),
        (["-o", str(TEXT / "below" / "it")], f"{TEXT}/below/it: no files can be written in {TEXT}"),
    ],
    ids=lambda value: " ".join(value)[-50:] if isinstance(value, list) else "",
)
def test_bad_values_are_one_clean_line_before_the_weights_are_read(kvant, tiny, tmp_path, flags, complaint):
    result = kvant("calibrate", str(tiny), *SMALL, "-o", str(tmp_path / "out"), *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: {complaint}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_weights")
def test_a_text_that_is_not_utf_8(kvant, tiny, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 999)
    flags = ("--kv", "--calib", str(tmp_path / "latin.txt"), "-o", str(tmp_path / "out"))
    result = kvant("calibrate", str(tiny), *flags)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "latin.txt is not UTF-8 (byte 3); convert it, or give another" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_weights")
def test_it_must_be_told_what_to_calibrate(kvant, tiny, tmp_path):
    result = kvant("calibrate", str(tiny), "-o", str(tmp_path / "out"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(
        "error: say what to calibrate: --kv measures the KV cache; weights are calibrated as"
    )


def test_a_wrong_command_line(kvant, tiny):
    assert kvant("calibrate", str(tiny), "--kv").exit_code == 2  # no directory
    for flags in (["--codes", "int4"], ["--layout", "mine"], ["--tp-size", "0"]):
        assert kvant("calibrate", str(tiny), "--kv", "-o", "out", *flags).exit_code == 2


def test_nothing_is_written_where_measuring_fails(kvant, tiny, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise NotFiniteError("the model's keys are not finite")

    monkeypatch.setattr(kv_calibrate, "measure_kv", fail)
    result = kvant("calibrate", str(tiny), *SMALL, "-o", str(tmp_path / "out"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: the model's keys are not finite\n"
    assert not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_written_after_all(kvant, tiny, tmp_path):
    (tmp_path / "kv_cache_scales.json").mkdir()
    result = kvant("calibrate", str(tiny), *SMALL, "-o", str(tmp_path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "kv_cache_scales.json cannot be written: " in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kv_cache_scales.json"]


def test_the_choices_are_those_of_the_library():
    assert {name.value for name in CodesName} == set(get_args(Codes))
    single, tensors = get_args(Layout)
    assert {name.value for name in LayoutName} == {*get_args(single), *get_args(tensors)}


def test_the_help_tells_the_defaults_and_needs_no_torch(kvant):
    shown = " ".join(kvant("calibrate", "--help").stdout.split())
    assert f"from its beginning. Default: {WINDOWS}." in shown
    assert f"Default: {WINDOW_SIZE}, or the model's longest context." in shown
    script = (
        "import sys; from kvant.cli.main import app; app(['calibrate', '--help'], standalone_mode=False);"
        "print('loaded', *sorted({'torch', 'numpy', 'rich.progress'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith("loaded\n"), done.stdout + done.stderr
    assert "\n  calibrate " in kvant("--help").stdout
