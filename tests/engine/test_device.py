"""Nothing in a step is made on the wrong device.

There is no second device here. But a tensor that is made without saying where gives itself away when the default is a
device of shapes alone ("meta"): what is computed with it has no values either, or cannot be computed.
"""

from __future__ import annotations

import pytest
import torch

from kvant.config import EngineConfig, SamplingParams
from kvant.engine.batch import build_batch
from kvant.engine.profile import run_largest_step
from kvant.engine.sampler import _reshape, sampling_batch
from kvant.evaluate.perplexity import compare_kv
from kvant.kernels.reference import ReferenceOps
from kvant.weights.load import load_model
from tests.engine.checkpoint import write_checkpoint
from tests.engine.drive import PLANS, core_of, text


@pytest.mark.parametrize("rope", [None, {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}])
@pytest.mark.parametrize("plan", PLANS)
def test_a_step_is_computed_where_the_ops_are(tmp_path, plan, rope):
    changes = {} if rope is None else {"rope_scaling": rope}
    model = load_model(write_checkpoint(tmp_path, **changes), dtype="float32", ops=ReferenceOps())
    core = core_of(model, PLANS[plan])
    wishes = ({"temperature": 0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "logprobs": 2})
    samplings = [SamplingParams(**wish, repetition_penalty=1.1, presence_penalty=0.1, max_tokens=3) for wish in wishes]
    for seed, sampling in enumerate(samplings):
        core.add(core.request(text(seed, 20), sampling, lambda *event: None))
    for _ in range(2):
        step = core._scheduler.plan()
        batch = build_batch(step, core.store.paging, model.spec.length_rope)
        samplers = [sequence for row in step.rows for sequence in row.samplers]
        wishes_of_all = sampling_batch(samplers, 0)  # on the host
        with torch.device("meta"), torch.inference_mode():
            hidden = model.decoder.forward(batch.ids, batch.attention, batch.rope_lengths, core.store.layers)
            logits = model.decoder.logits(hidden[[stop - 1 for stop in batch.attention.query_starts[1:]]])
            for row, sequence in enumerate(samplers):
                _reshape(logits[row], sequence)
            tokens = model.decoder.ops.sample(logits, wishes_of_all)
        written = core.store.blocks.clone()
        [sampled] = core._runner.run(step)
        assert torch.equal(core.store.blocks, written)
        assert [item.token_id for item in sampled] == tokens.tolist()
        core._scheduler.commit(step, sampled)
        assert len(samplers) == 2


def test_predictions_are_scored_where_the_ops_are(tiny_model):
    windows = [text(1, 70)]
    expected = compare_kv(tiny_model, {"int8": PLANS["int8"]}, windows)
    with torch.device("meta"):
        assert compare_kv(tiny_model, {"int8": PLANS["int8"]}, windows) == expected


@pytest.mark.parametrize("plan", ["fp16", "mixed"])
def test_the_largest_step_is_as_large_as_the_limits_say(tiny_model, monkeypatch, plan):
    """What a GPU's memory is measured with."""
    seen = []
    forward, logits = tiny_model.decoder.forward, tiny_model.decoder.logits
    monkeypatch.setattr(tiny_model.decoder, "forward", lambda *args: seen.append(len(args[0])) or forward(*args))
    monkeypatch.setattr(tiny_model.decoder, "logits", lambda rows: seen.append(len(rows)) or logits(rows))
    limits = EngineConfig(max_num_batched_tokens=50, max_num_seqs=7).limits("cuda")
    size = run_largest_step(tiny_model.decoder, limits, PLANS[plan], 16)
    assert seen == [50, 7]
    assert size >= 50 * PLANS[plan].bytes_per_token(tiny_model.spec.kv_shape)


def test_a_gpu_has_larger_steps_unless_told_otherwise():
    assert vars(EngineConfig().limits("cpu")) == {
        "max_num_seqs": 64,
        "max_num_batched_tokens": 512,
        "overlapping": False,
    }
    gpu = EngineConfig(max_num_seqs=5).limits("cuda")
    assert (gpu.max_num_seqs, gpu.max_num_batched_tokens > 512, gpu.overlapping) == (5, True, True)
    assert not EngineConfig(async_scheduling=False).limits("cuda").overlapping
