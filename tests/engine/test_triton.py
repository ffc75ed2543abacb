"""The engine on Triton's kernels, in their interpreter: what the reference says, through every part of a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from kvant.config import SamplingParams
from kvant.engine.batch import Batch
from kvant.formats.kv import KV_FORMATS, KVPlan, resolve_kv_format
from kvant.kernels.reference import ReferenceOps
from kvant.kernels.triton.ops import TritonOps
from kvant.models.forcing import force, new_store
from kvant.quantize.rtn import rtn
from kvant.weights.load import LoadedModel, load_model
from kvant.weights.matrices import Rounding
from tests.engine.checkpoint import write_checkpoint
from tests.engine.drive import HEADS, Ask, Outcome, core_of, drive, text
from tests.engine.test_graphs import recording
from tests.formats.stats import plan_of

pytestmark = pytest.mark.usefixtures("single_thread")
PLANS_OF_64 = {name: plan_of(KV_FORMATS[name], 2, HEADS, 64) for name in ("fp32", "int8_plain", "int4")}
INT4 = Rounding("int4 in groups of 32", 4.5, lambda matrix: rtn(matrix, 4, 32))
ASKS: list[Ask] = [
    (text(1, 9), SamplingParams(temperature=0, max_tokens=4)),
    (text(2, 33), SamplingParams(temperature=0, max_tokens=3, logprobs=2)),
    (text(3, 1), SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=3)),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, LoadedModel]:
    """A miniature of sizes that kernels are made for, on both backends, in float32."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 64, "num_attention_heads": 4}
    path = write_checkpoint(tmp_path_factory.mktemp("wide"), **sizes)
    return {
        f"{ops.name} {kind}": load_model(path, dtype="float32", ops=ops, weights=weights)
        for ops in (ReferenceOps(), TritonOps())
        for kind, weights in (("dense", "dense"), ("int4", INT4))
    }


def said(outcome: Outcome) -> list[list[int]]:
    return [request.sequences[0].output for request in outcome.requests]


@pytest.mark.parametrize("weights", ["dense", "int4"])
@pytest.mark.parametrize("kv", ["fp32", "int8_plain"])
def test_it_says_what_the_reference_says(models, kv, weights):
    plan = PLANS_OF_64[kv]
    settings: dict[str, Any] = {"max_num_batched_tokens": 20, "block_size": 16}
    expected = drive(core_of(models[f"reference {weights}"], plan, **settings), ASKS)
    found = drive(core_of(models[f"triton {weights}"], plan, async_scheduling=True, **settings), ASKS)
    assert said(found) == said(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_embedding_of_codes_makes_no_model_of_float32(tmp_path, dtype):
    path = write_checkpoint(tmp_path, hidden_size=64, intermediate_size=96, head_dim=64, num_hidden_layers=1)
    model = load_model(path, dtype=dtype, ops=TritonOps(), weights=INT4)
    plan = KVPlan.uniform(resolve_kv_format("auto", model.dtype), 1)
    hidden = force(model.decoder, new_store(model.decoder, plan, 3), text(1, 3), 3)
    assert hidden.dtype == model.dtype
    assert model.decoder.logits(hidden).dtype == torch.float32
    expected = load_model(path, dtype="float32", ops=ReferenceOps(), weights=INT4).decoder
    close = force(expected, new_store(expected, plan, 3), text(1, 3), 3)
    assert (hidden.float() - close).norm() < 0.03 * close.norm()


@pytest.mark.parametrize("tokens", [0, 64])
def test_recorded_steps_say_the_same(models, tokens, monkeypatch):
    settings: dict[str, Any] = {"max_num_seqs": 4, "block_size": 16, "enable_prefix_caching": False}
    model, plan = models["triton int4"], PLANS_OF_64["int4"]
    calls: list[int] = []
    expected = said(drive(core_of(model, plan, **settings), ASKS))
    core = recording(core_of(model, plan, async_scheduling=True, **settings), calls, 4, tokens)
    if tokens:
        monkeypatch.delattr(Batch, "to")  # what is launched would be sent
    assert said(drive(core, ASKS)) == expected
    assert calls


def test_what_is_not_finite_ends_its_own_request(models):
    """Kernels raise nothing; the marks that they leave are seen when the tokens arrive."""
    from kvant.engine.sequence import Failure
    from kvant.errors import NotFiniteError

    model = models["triton dense"]
    core = core_of(model, PLANS_OF_64["int8_plain"], block_size=16)
    requests = [core.request(text(seed, 8 + seed), ASKS[0][1], lambda *event: None) for seed in range(2)]
    for request in requests:
        core.add(request)
    write = model.decoder.ops.rope_write_kv

    def overflowing(q, k, v, rotary, cache, batch):
        k = k.clone()
        k[3] = float("inf")
        return write(q, k, v, rotary, cache, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.decoder.ops, "rope_write_kv", overflowing)
        [(request, failure)] = core.step()
        with pytest.raises(NotFiniteError):
            force(model.decoder, new_store(model.decoder, PLANS_OF_64["int8_plain"], 8), text(1, 8), 8)
    assert request is requests[0]
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, NotFiniteError)
    while core.has_work():
        core.step()
    assert len(requests[1].sequences[0].output) == 4
