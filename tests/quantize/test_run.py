"""Quantizing whole models: every family, interruptions, and what cannot be done."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvant.errors import ConfigError, CorruptModelError, KvantError, NotFiniteError, UnsupportedModelError
from kvant.kernels.reference import ReferenceOps
from kvant.models.families import model_spec
from kvant.quantize import run
from kvant.quantize.chunked import UnpreparedOps
from kvant.quantize.folds import find_folds
from kvant.quantize.methods import METHODS
from kvant.quantize.reader import Reader
from kvant.quantize.recipe import Recipe
from kvant.quantize.run import Texts, quantize
from kvant.weights import save
from kvant.weights.load import WeightLoader, load_model, open_source
from kvant.weights.matrices import MatrixReader
from tests.engine.checkpoint import VOCAB, write_checkpoint
from tests.families.configs import TINIES
from tests.families.tiny import build
from tests.support import model_logits

# One of each way in which families differ: biases, fused and reordered rows, norms with an offset and post norms.
FAMILIES = (
    *("llama-3.1", "qwen2-large-biases", "qwen3", "qwen-v1-neither", "internlm2"),
    *("phi-3-4k", "gemma", "gemma-2", "gemma-3-1b"),
)
FINE = Recipe(method="awq", bits=8, group_size=16, samples=9, seqlen=24)


def texts(vocab: int = VOCAB, count: int = 9, length: int = 24) -> Texts:
    ids = torch.randint(3, vocab, (count + 2, length), generator=torch.Generator().manual_seed(3)).tolist()
    return Texts("random tokens", tuple(map(tuple, ids[:-2])), tuple(map(tuple, ids[-2:])))


def quantized(model: Path, out: Path, recipe: Recipe = FINE, vocab: int = VOCAB):
    read = texts(vocab, recipe.samples, recipe.seqlen)
    return quantize(open_source(model), out, recipe, read, lambda done, total: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", intermediate_size=64)  # GPTQ stores words of 32


def layer_folds(path: Path, index: int = 0) -> dict[str, tuple[str, bool]]:
    """What each linear's inputs can be divided in, and whether some of them must have the same factor."""
    source = open_source(path)
    spec = model_spec(source.config)
    loader = WeightLoader(source, spec, MatrixReader(source, torch.float32, "dense", False), UnpreparedOps())
    hidden = torch.randn(16, spec.hidden_size, generator=torch.Generator().manual_seed(0))
    reader, layer = Reader.of(spec, UnpreparedOps(), 1, 16), loader.layer(index)
    with torch.inference_mode():
        folds = find_folds(layer, spec, torch.float32, lambda it: reader.layer(index, it, hidden) - hidden)
    return {kind: (fold.producer, fold.ties is not None) for kind, fold in folds.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_quantized_and_read_again(family: str, tmp_path: Path) -> None:
    """8 bits in small groups leave the logits nearly as they were, so every tensor is where it belongs."""
    checkpoint = build(TINIES[family], tmp_path)
    config = checkpoint.tiny.config
    vocab = config.get("vocab_size") or config["text_config"]["vocab_size"]
    outcome = quantized(checkpoint.published, tmp_path / "out", vocab=min(vocab, 120))
    assert any(report.divided for report in outcome.linears)
    expected, found = (model_logits(path, checkpoint.ids) for path in (checkpoint.published, tmp_path / "out"))
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert outcome.kl < 0.01
    assert outcome.ppl == pytest.approx(outcome.ppl_original, rel=0.05)


def test_what_feeds_a_linear_is_found_by_trying(tmp_path: Path, tiny: Path) -> None:
    grouped_queries = {
        "qkv": ("input_norm", False),
        "out": ("qkv", True),
        "gate_up": ("mlp_norm", False),
        "down": ("gate_up", False),
    }
    assert layer_folds(tiny) == grouped_queries
    equal_heads = write_checkpoint(tmp_path / "mha", num_key_value_heads=4)
    assert layer_folds(equal_heads) == {**grouped_queries, "out": ("qkv", False)}


def test_the_outcome_is_what_the_stored_model_gives(tiny: Path, tmp_path: Path) -> None:
    """Perplexity and KL of the report, against the two checkpoints loaded and run by the reference."""
    recipe = replace(FINE, method="rtn", bits=4)
    outcome = quantized(tiny, tmp_path / "out", recipe)
    unseen = texts(count=recipe.samples, length=recipe.seqlen).unseen
    logits = [
        torch.cat([model_logits(path, list(ids))[:-1] for ids in unseen]).double().log_softmax(-1)
        for path in (tiny, tmp_path / "out")
    ]
    targets = torch.tensor([token for ids in unseen for token in ids[1:]]).unsqueeze(1)
    ppl = [float((-it.gather(1, targets)).mean().exp()) for it in logits]
    kl = float((logits[0].exp() * (logits[0] - logits[1])).sum(1).mean())
    assert [outcome.ppl_original, outcome.ppl] == pytest.approx(ppl, rel=1e-3)
    assert outcome.kl == pytest.approx(kl, rel=1e-2)
    assert outcome.top1 == pytest.approx(float((logits[0].argmax(1) == logits[1].argmax(1)).double().mean()))


@pytest.mark.parametrize(
    ("format", "method", "bits"),
    [
        ("compressed-tensors", "gptq", 4),
        ("compressed-tensors", "auto", 4),
        ("compressed-tensors", "smoothquant", 8),
        ("compressed-tensors", "rtn", 8),
        ("gptq", "gptq", 4),
        ("gptq", "awq", 8),
        ("awq", "awq", 4),
        ("awq", "gptq", 4),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_format_holds_every_method(format, method, bits, symmetric, tiny: Path, tmp_path: Path) -> None:  # noqa: A002
    if method == "smoothquant" and not symmetric:
        pytest.skip("has no zero points")
    group = -1 if method == "smoothquant" else 16
    recipe = replace(FINE, format=format, method=method, bits=bits, symmetric=symmetric, group_size=group)
    outcome = quantized(tiny, tmp_path / "out", recipe)
    model = load_model(tmp_path / "out", dtype="float32", ops=ReferenceOps())
    assert model.source.config["quantization_config"]["quant_method"] == format
    assert outcome.kl < 0.3
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert {"ppl", "ppl_original", "kl", "top1", "seconds", "peak_memory"} <= report.keys()
    assert report["kl"] == outcome.kl
    assert f"{outcome.kl:.4f}" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_ignored_stays_as_it_was(tiny: Path, tmp_path: Path) -> None:
    recipe = replace(FINE, bits=4, method="rtn", ignore=("*.layers.0.*", "*.down_proj"))
    outcome = quantized(tiny, tmp_path / "out", recipe)
    assert [(it.layer, it.linear) for it in outcome.linears] == [(1, "qkv"), (1, "out"), (1, "gate_up")]
    before, after = open_source(tiny), open_source(tmp_path / "out")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert torch.equal(before.read(name, torch.float32), after.read(name, torch.float32))
        assert after.packed(name) is None
    ignored = after.config["quantization_config"]["ignore"]
    assert "lm_head" in ignored
    assert "model.layers.1.mlp.down_proj" in ignored
    with pytest.raises(ConfigError, match=r"'down_proj' is no module's name, such as .*down_proj"):
        quantized(tiny, tmp_path / "none", replace(FINE, ignore=("down_proj",)))
    with pytest.raises(ConfigError, match="nothing to quantize"):
        quantized(tiny, tmp_path / "none", replace(FINE, ignore=("*",)))


def test_what_is_ignored_is_not_scaled_either(tiny: Path, tmp_path: Path) -> None:
    """Values and the up projection could take factors off attention's output and the down projection."""
    recipe = replace(FINE, bits=4, method="awq", ignore=("*.up_proj", "*.v_proj"))
    outcome = quantized(tiny, tmp_path / "out", recipe)
    assert {it.divided for it in outcome.linears} == {None}
    before, after = open_source(tiny), open_source(tmp_path / "out")
    for name in ("self_attn.v_proj", "mlp.up_proj"):
        full = f"model.layers.0.{name}.weight"
        assert torch.equal(before.read(full, torch.float32), after.read(full, torch.float32))


def test_weights_that_the_model_has_no_place_for_are_told(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="no place"):
        quantized(other, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_waiting_layer_keeps_its_residual_and_little_else(tiny: Path) -> None:
    """Many texts wait at a linear at once: what their coroutines still hold is what quantizing takes at most."""
    source = open_source(tiny)
    spec = model_spec(source.config)
    loader = WeightLoader(source, spec, MatrixReader(source, torch.float32, "dense", False), UnpreparedOps())
    layer, hidden = loader.layer(0), torch.randn(16, spec.hidden_size)
    products = Reader.of(spec, UnpreparedOps(), 1, 16).products(0, layer, hidden)
    linear, x = next(products)
    for _ in range(4):
        held = [it for it in products.gi_frame.f_locals.values() if isinstance(it, torch.Tensor) and it.dim() == 2]
        assert sum(it.numel() for it in held) <= hidden.numel()
        if linear is not layer.mlp.down:
            linear, x = products.send(UnpreparedOps().linear(x, linear.weight))


def test_methods_that_compare_keep_some_text_apart(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []

    def spy(problem):
        seen.append((problem.inputs.count, problem.held_out.inputs.count))
        return METHODS["rtn"](problem)

    monkeypatch.setattr(run, "METHODS", {"auto": spy})
    quantized(tiny, tmp_path / "out", replace(FINE, method="auto", samples=16))
    assert set(seen) == {(16 * 24, 15 * 24)}


def test_one_text_is_enough_to_choose_by(tiny: Path, tmp_path: Path) -> None:
    outcome = quantized(tiny, tmp_path / "out", replace(FINE, method="auto", samples=1))
    assert {it.method for it in outcome.linears} <= {"gptq", "awq"}
    assert outcome.kl < 0.3


def test_whole_rows(tiny: Path, tmp_path: Path) -> None:
    outcome = quantized(tiny, tmp_path / "out", replace(FINE, method="gptq", group_size=-1))
    assert {it.group_size for it in outcome.linears} == {32, 64}
    assert outcome.kl < 0.05


class Interrupt(KeyboardInterrupt):
    """Somebody's Ctrl-C."""


def interrupted(model: Path, out: Path, recipe: Recipe) -> None:
    def stop(done: int, total: int) -> None:
        if done == 1:
            raise Interrupt

    with pytest.raises(Interrupt):
        quantize(open_source(model), out, recipe, texts(VOCAB, recipe.samples, recipe.seqlen), stop)


def test_an_interrupted_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    recipe = replace(FINE, method="gptq", bits=4)
    whole = quantized(tiny, tmp_path / "whole", recipe)
    interrupted(tiny, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
    seen = []
    read = texts(VOCAB, recipe.samples, recipe.seqlen)
    found = quantize(open_source(tiny), tmp_path / "out", recipe, read, lambda done, total: seen.append(done))
    assert seen == [1, 2]
    assert (found.ppl, found.kl, found.linears) == (whole.ppl, whole.kl, whole.linears)
    assert not (tmp_path / "out.partial").exists()
    for file in sorted((tmp_path / "whole").glob("*.safetensors")):
        ours, theirs = load_file(tmp_path / "out" / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list((tmp_path / "out").glob("state*"))


def test_an_unfinished_run_with_other_settings_is_not_mixed_in(tiny: Path, tmp_path: Path) -> None:
    interrupted(tiny, tmp_path / "out", FINE)
    with pytest.raises(ConfigError, match="with bits=8, symmetric=True;"):
        quantized(tiny, tmp_path / "out", replace(FINE, bits=4, symmetric=False))
    (tmp_path / "out.partial" / "state.safetensors").write_bytes(b"not a file")
    with pytest.raises(ConfigError, match="remove it"):
        quantized(tiny, tmp_path / "out")


def test_somebody_elses_directory_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match=r"thesis.tex"):
        quantized(tiny, tmp_path / "out")
    assert (partial / "thesis.tex").exists()


def test_two_runs_do_not_work_on_one_directory(tiny: Path, tmp_path: Path) -> None:
    interrupted(tiny, tmp_path / "out", FINE)
    with (
        save.CheckpointWriter(tmp_path / "out", 3).locked(),
        pytest.raises(ConfigError, match=r"another run is working on .*out.partial"),
    ):
        quantized(tiny, tmp_path / "out")
    assert quantized(tiny, tmp_path / "out").kl < 0.01


def test_files_have_the_modes_that_the_user_wants(tiny: Path, tmp_path: Path) -> None:
    quantized(tiny, tmp_path / "out")
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_a_source_in_few_bits_is_told(tiny: Path, tmp_path: Path) -> None:
    assert not quantized(tiny, tmp_path / "once").was_quantized
    twice = quantized(tmp_path / "once", tmp_path / "twice")
    assert twice.was_quantized
    assert "in few bits already" in (tmp_path / "twice" / "README.md").read_text()


def test_shards_of_a_run_that_kept_nothing_are_not_taken(tiny: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"old")
    quantized(tiny, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_full_disk_leaves_nothing_that_looks_whole(at: int, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    real, calls = save.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(save, "save_file", full)
    with pytest.raises(ConfigError, match=r"No space left on device.*make room"):
        quantized(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "out.partial").glob(".model*.writing"))
    monkeypatch.undo()
    assert quantized(tiny, tmp_path / "out").kl < 0.01


def test_a_disk_that_is_full_at_the_very_end_loses_no_layer(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    def full(source, directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "_write_tokenizer", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        quantized(tiny, tmp_path / "out")
    monkeypatch.undo()
    done = []
    quantize(
        open_source(tiny), tmp_path / "out", FINE, texts(VOCAB, FINE.samples, FINE.seqlen), lambda *it: done.append(it)
    )
    assert done == [(2, 2)]


def test_weights_that_are_not_finite_are_told_with_their_layer(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.gate_proj.weight"][3, 4] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"layer 1 of .*gate_up: .*not finite"):
        quantized(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_text_on_which_the_model_gives_nothing_finite_is_told(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"][:] = 1e20
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"layer 0 of .*give another text"):
        quantized(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corrupt_shard_is_told_at_once(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptModelError, match="not a whole safetensors file"):
        quantized(broken, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_shard_that_was_lost_in_between_is_told(tiny: Path, tmp_path: Path) -> None:
    interrupted(tiny, tmp_path / "out", FINE)
    (tmp_path / "out.partial" / "model-00002-of-00003.safetensors").write_bytes(b"lost")
    with pytest.raises(KvantError, match=r"model-00002-of-00003.safetensors"):
        quantized(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_format_has_no_place_for_is_told_before_the_work(tmp_path: Path) -> None:
    odd = write_checkpoint(tmp_path / "odd", intermediate_size=176)
    with pytest.raises(UnsupportedModelError, match=r"no multiple of 32.*compressed-tensors"):
        quantized(odd, tmp_path / "out", replace(FINE, format="gptq", bits=4))
    assert not list(tmp_path.glob("out*"))


def test_awq_has_one_group_that_fits_all_layers(tmp_path: Path) -> None:
    odd = write_checkpoint(tmp_path / "odd", intermediate_size=176)  # 32 would fit the others
    outcome = quantized(odd, tmp_path / "out", replace(FINE, format="awq", bits=4, group_size=32))
    assert {it.group_size for it in outcome.linears} == {16}
    assert load_model(tmp_path / "out", dtype="float32", ops=ReferenceOps()).spec.intermediate_size == 176
