"""One text through a decoder without an engine, against the same text in a single step through scattered blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvant.formats.kv import KV_FORMATS, KVFormat, KVPlan, LayerPlan
from kvant.formats.kv_codecs import AffineCodec
from kvant.kernels.reference import ReferenceOps
from kvant.models import forcing
from kvant.models.forcing import force, new_store
from kvant.weights.load import LoadedModel, load_model
from tests.engine.checkpoint import write_checkpoint
from tests.support import SingleText

IDS = torch.randint(0, 256, (90,), generator=torch.Generator().manual_seed(1)).tolist()
SINKS = KVFormat("sinks", AffineCodec(8), AffineCodec(4), "", sinks=4)
PLANS = {
    "fp32": KVPlan.uniform(KV_FORMATS["fp32"], 2),
    "sinks": KVPlan.uniform(SINKS, 2),
    "mixed": KVPlan("mixed", (LayerPlan(KV_FORMATS["fp16"]), LayerPlan(SINKS))),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The miniature; in its first layer a token sees 19 others."""
    directory: Path = tmp_path_factory.mktemp("tiny")
    window = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 19}
    write_checkpoint(directory, layer_types=["sliding_attention", "full_attention"], **window)
    return load_model(directory, dtype="float32", ops=ReferenceOps())


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("chunk", [1, 17, 90, 256])
def test_the_states_are_those_of_one_step_whatever_the_chunk(model, monkeypatch, plan, chunk):
    monkeypatch.setattr(forcing, "CHUNK", chunk)
    decoder = model.decoder
    states = force(decoder, new_store(decoder, plan, len(IDS)), IDS, len(IDS))
    assert states.shape == (90, model.spec.hidden_size)
    expected = SingleText(decoder, len(IDS), len(IDS), kv=plan).feed(IDS)
    # The miniature's logits are of the order of 10.
    torch.testing.assert_close(decoder.logits(states), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_token_lies_in_the_store_in_order(model, plan):
    decoder = model.decoder
    store = new_store(decoder, plan, len(IDS))
    force(decoder, store, IDS, len(IDS))
    text = SingleText(decoder, len(IDS), len(IDS), kv=plan)
    text.feed(IDS)
    for layer, expected in zip(store.layers, text.store.layers, strict=True):
        for side in ("key", "value"):
            found = layer.read(side, torch.arange(store.num_blocks))[:, : len(IDS)]
            torch.testing.assert_close(found, expected.read(side, text._table)[:, : len(IDS)], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("tokens", "fp32", "sinks"), [(1, 1, 1), (52, 1, 1), (53, 1, 2), (64, 1, 2), (65, 2, 2)])
def test_a_store_has_room_for_the_text_and_what_its_sinks_take(model, tokens, fp32, sinks):
    assert forcing.BLOCK_SIZE == 64
    for name, blocks in (("fp32", fp32), ("sinks", sinks)):
        store = new_store(model.decoder, PLANS[name], tokens)
        assert store.num_blocks == blocks
        force(model.decoder, store, IDS[:tokens], tokens)


def test_a_token_does_not_see_those_that_follow(model):
    decoder = model.decoder
    whole, part = (
        force(decoder, new_store(decoder, PLANS["fp32"], len(IDS)), ids, len(IDS)) for ids in (IDS, IDS[:50])
    )
    assert torch.equal(whole[:50], part)
    changed = force(decoder, new_store(decoder, PLANS["fp32"], len(IDS)), [*IDS[:50], 3, *IDS[51:]], len(IDS))
    assert torch.equal(whole[:50], changed[:50])
    assert not torch.isclose(whole[50:], changed[50:]).all(-1).any()


def test_where_rope_depends_on_the_length_it_is_the_prompts(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 32}
    path = write_checkpoint(tmp_path, rope_scaling=scaling, max_position_embeddings=32)
    decoder = load_model(path, dtype="float32", ops=ReferenceOps()).decoder
    found = {}
    for length in (20, 60, 90):
        states = force(decoder, new_store(decoder, PLANS["fp32"], 60), IDS[:60], length)
        expected = SingleText(decoder, length, 60).feed(IDS[:60])
        torch.testing.assert_close(decoder.logits(states), expected, rtol=0, atol=1e-3)
        found[length] = states
    assert not torch.isclose(found[60], found[90], atol=1e-2).all()
    assert not torch.isclose(found[20], found[60], atol=1e-2).all()


def test_no_gradients_are_kept(model):
    assert force(model.decoder, new_store(model.decoder, PLANS["fp32"], 5), IDS[:5], 5).is_inference()
