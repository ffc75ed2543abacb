"""Every format, with constants measured on the model at hand, on miniatures of all shapes that families have."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvant.formats.kv import KV_FORMATS, KVPlan
from kvant.kernels.reference import ReferenceOps
from kvant.models.decoder import Decoder
from kvant.models.forcing import force, new_store
from kvant.quantize.kv_constants import layer_plan
from kvant.quantize.kv_measure import measure_kv
from kvant.quantize.scores import score
from kvant.weights.load import load_model
from tests.families.configs import TINIES
from tests.families.tiny import build

LENGTH = 160
# Miniature, and what makes its heads as large as those of the family's releases.
MODELS = {
    "gemma-3-1b": {"head_dim": 256},  # windows, norms of queries and keys, one KV head, two bases
    "gemma-2": {"head_dim": 128},  # soft-caps
    "llama-1": {"hidden_size": 512},  # as many KV heads as heads, no biases
    "llama-3.1": {"head_dim": 64},
    "phi-3-4k": {"hidden_size": 384},  # heads of 96
    "phi-4-mini": {},  # three quarters of a head turn, by frequencies that depend on the length
    "qwen3": {"head_dim": 128},  # norms of queries and keys
    "qwen2-large-biases": {"hidden_size": 256},
    "qwen-v1-partial-rotary": {},
}
# Mean KL from a float32 cache in nats: twice the worst that was measured, for logits whose entropy is 3.4 to 4.5.
BOUNDS = {
    "fp32": 0.0, "fp16": 1e-5, "bf16": 5e-4, "int8": 0.005, "int8_plain": 0.007, "int8_pertoken": 0.01,
    "int8_pertensor": 0.01, "int8_pertensor_perhead": 0.02, "fp8_e4m3": 0.13, "fp8_e5m2": 0.3, "k8v4": 0.2,
    "int4": 0.5, "int4_plain": 0.8,
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def decoder_of(path: Path) -> Decoder:
    return load_model(path, dtype="float32", ops=ReferenceOps()).decoder


def texts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 120, (LENGTH,), generator=generator).tolist() for _ in range(count)]


def logits_by_format(decoder: Decoder) -> dict[str, Tensor]:
    """Logits [LENGTH, vocab] over a text, on none of which the formats' constants were measured."""
    *known, ids = texts(3)
    statistics = measure_kv(decoder, known)
    found = {}
    for name, fmt in KV_FORMATS.items():
        layers = zip(statistics.layers, decoder.spec.layers, strict=True)
        plan = KVPlan(name, tuple(layer_plan(fmt, of_layer, layer.rope) for of_layer, layer in layers))
        found[name] = decoder.logits(force(decoder, new_store(decoder, plan, LENGTH), ids, LENGTH))
    return found


def divergences(logits: dict[str, Tensor]) -> dict[str, float]:
    """Mean KL of each format's predictions from those of a float32 cache."""
    targets = torch.zeros(LENGTH, dtype=torch.int64)
    return {name: float(score(logits["fp32"], x, targets).kl.mean()) for name, x in logits.items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_any_shape_runs_in_every_format(tmp_path, name):
    tiny = TINIES[name]
    decoder = decoder_of(build(replace(tiny, config=tiny.config | MODELS[name]), tmp_path).published)
    logits = logits_by_format(decoder)
    assert all(x.isfinite().all() for x in logits.values())
    assert logits["fp32"].std() > 0.5
    found = divergences(logits)
    for fmt, kl in found.items():
        assert kl <= BOUNDS[fmt], fmt
    assert found["fp16"] < found["int8"] < found["k8v4"] < found["int4"] < found["int4_plain"]


@pytest.fixture(scope="module")
def unbiased(tmp_path_factory) -> Path:
    """Qwen2 with heads of 64 and small biases."""
    tiny = TINIES["qwen2-large-biases"]
    tiny = replace(tiny, config=tiny.config | {"hidden_size": 256}, bias_std=0.5)
    return build(tiny, tmp_path_factory.mktemp("qwen2")).published


def with_key_biases(path: Path, size: float) -> Path:
    """The checkpoint there, its keys moved by so much in the pairs that turn slowly, as Qwen2's releases have it."""
    file = path / "model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(1)
    for name, bias in weights.items():
        if name.endswith("k_proj.bias"):
            slow = bias.view(2, 2, 32)[..., 20:]  # of 2 KV heads, the halves of pairs 20 to 31
            slow += size * torch.randn(slow.shape, generator=generator).sign()
    save_file(weights, file, metadata={"format": "pt"})
    return path


def test_what_all_keys_have_in_common_costs_centred_formats_nothing(unbiased):
    """And ruins those that nothing is measured for: most of their range goes to what tells no key from another."""
    before = divergences(logits_by_format(decoder_of(unbiased)))
    after = divergences(logits_by_format(decoder_of(with_key_biases(unbiased, 60.0))))
    for name in ("int8", "int4", "k8v4", "int8_pertensor", "fp8_e4m3"):
        assert after[name] < 1.2 * before[name], name
    assert after["int4_plain"] > 10 * after["int4"]
    assert after["int8_plain"] > 10 * after["int8"]
