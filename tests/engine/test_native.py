"""The front door on native kernels, as users come through it: with the best that the machine has, or another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvant.config import EngineConfig, SamplingParams
from kvant.pipelines import Pipeline, pipeline
from tests.engine.checkpoint import END, write_checkpoint
from tests.engine.drive import text
from tests.support import NATIVE

pytestmark = pytest.mark.usefixtures("single_thread", "isa")

NO_MARKS = dict.fromkeys(range(256, END + 1), -100.0)
GREEDY = SamplingParams(temperature=0, max_tokens=24, logit_bias=NO_MARKS)


@pytest.fixture(params=NATIVE)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that computes: the best one as it is found, the others by name."""
    if request.param == NATIVE[0]:
        monkeypatch.delenv("KVANT_CPU_ISA")
    else:
        monkeypatch.setenv("KVANT_CPU_ISA", request.param)
    return request.param


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of sizes that every kernel has a loop for."""
    return write_checkpoint(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=96, head_dim=64)


def opened(path: Path, **config: object) -> Pipeline:
    return pipeline(path, engine=EngineConfig(max_model_len=200, num_kv_blocks=100, **config))


def test_weights_and_cache_in_4_bits(path, isa):
    prompts = ["one", "another one, and a longer one at that: " * 3, [{"role": "user", "content": "hello"}]]
    with opened(path, weights="int4", kv_cache_dtype="int4", enable_prefix_caching=False) as pipe:
        assert pipe._served.engine.core._model.decoder.ops.name == isa
        first = [pipe(prompt, GREEDY) for prompt in prompts]
        for prompt, response in zip(prompts, first, strict=True):
            assert len(response.token_ids) == 24
            deltas = list(pipe.stream(prompt, GREEDY))
            assert tuple(token for delta in deltas for token in delta.token_ids) == response.token_ids
            assert "".join(delta.text for delta in deltas) == response.text
        assert len({response.token_ids for response in first}) == 3


def test_dense_weights_and_an_exact_cache_give_transformers_tokens(path):
    prompts = [text(seed, length) for seed, length in ((1, 1), (2, 30), (3, 150))]
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with opened(path, dtype="float32", weights="dense", kv_cache_dtype="fp32") as pipe:
        found = pipe(prompts, SamplingParams(temperature=0, max_tokens=16, ignore_eos=True))
    for prompt, response in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            expected = reference.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
        assert response.token_ids == tuple(expected[0, len(prompt) :].tolist())


def test_a_temperature_may_be_a_whole_number(path):
    with opened(path, dtype="float32", kv_cache_dtype="fp32") as pipe:
        one, same, greedy = (
            pipe("tell me", SamplingParams(temperature=t, seed=3, max_tokens=20, ignore_eos=True)) for t in (1, 1.0, 0)
        )
    assert one.token_ids == same.token_ids != greedy.token_ids
