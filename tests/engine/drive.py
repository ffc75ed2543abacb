"""Driving a `Core` by hand, and keeping what its KV cache held for every token of every choice."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvant.cache.blocks import Paging
from kvant.cache.store import KVStore
from kvant.config import EngineConfig, SamplingParams
from kvant.engine.core import Core
from kvant.engine.engine import Engine
from kvant.engine.sequence import Request, Sequence, TokenEvent
from kvant.formats.kv import KV_FORMATS, SINK_SPAN, KVLayer, KVPlan, LayerPlan
from kvant.weights.load import LoadedModel
from tests.formats.stats import layer_plan_of, plan_of

Ask = tuple[list[int], SamplingParams]
HEADS, HEAD_DIM = 2, 16  # the miniature's KV heads, in each of two layers
PLANS = {name: plan_of(fmt, 2, HEADS, HEAD_DIM) for name, fmt in KV_FORMATS.items()}
PLANS["mixed"] = KVPlan("mixed", (LayerPlan(KV_FORMATS["fp16"]), layer_plan_of(KV_FORMATS["int4"], HEADS, HEAD_DIM)))


def text(seed: int, length: int) -> list[int]:
    """Random token ids that stand for bytes."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def core_of(model: LoadedModel, kv: KVPlan | None = None, room: int | None = None, **config: object) -> Core:
    """A core with room for everything, unless told otherwise, or for so many tokens of one sequence."""
    lead = kv.lead if kv is not None else 0
    usual = {"kv_cache_dtype": "fp32", "max_model_len": 192, "block_size": 16 if lead else 8, "num_kv_blocks": 400}
    settings: dict[str, Any] = usual | config
    if room is not None:
        settings["num_kv_blocks"] = Paging(settings["block_size"], lead).blocks_for(room)
    return Core(model, EngineConfig(**settings), kv=kv)


@dataclass
class Outcome:
    """What came of some requests.

    Attributes:
        outputs: by request and choice.
        kv: the cache's bytes of each choice, [tokens, bytes of all layers and planes].
    """

    requests: list[Request]
    preemptions: int = 0
    events: list[tuple[Request, TokenEvent]] = field(default_factory=list)
    kv: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def outputs(self) -> list[list[list[int]]]:
        return [[sequence.output for sequence in request.sequences] for request in self.requests]

    def note_kv(self, store: KVStore) -> None:
        """Take down the bytes of all running choices; what was there before must not have changed."""
        for number, request in enumerate(self.requests):
            for sequence in request.sequences:
                if sequence.blocks:
                    key, now = (number, sequence.index), kv_bytes(store, sequence)
                    before = self.kv.get(key, now)
                    common = min(len(before), len(now))
                    assert torch.equal(before[:common], now[:common]), f"the KV of {key} has changed"
                    self.kv[key] = max(before, now, key=len)


def drive(core: Core, asks: List[Ask]) -> Outcome:
    """Run requests that arrive together to their ends."""
    before = core.stats().preemptions
    outcome = Outcome([core.request(prompt, sampling, lambda *event: None) for prompt, sampling in asks])
    for request in outcome.requests:
        core.add(request)
    while core.has_work():
        outcome.events += core.step()
        outcome.note_kv(core.store)
    outcome.preemptions = core.stats().preemptions - before
    assert core.stats().kv_blocks_used == core.stats().running == core.stats().waiting == 0
    return outcome


def drive_alone(model: LoadedModel, asks: List[Ask], kv: KVPlan | None = None, **config: object) -> Outcome:
    """Each request in an engine of its own that shares nothing."""
    whole = Outcome([])
    for number, ask in enumerate(asks):
        outcome = drive(core_of(model, kv, enable_prefix_caching=False, **config), [ask])
        whole.requests += outcome.requests
        whole.events += outcome.events
        whole.kv |= {(number, index): kept for (_, index), kept in outcome.kv.items()}
    return whole


def kv_bytes(store: KVStore, sequence: Sequence) -> Tensor:
    """What the store holds for the computed tokens of a running sequence: [tokens, bytes of all layers] uint8."""
    blocks = torch.tensor(sequence.blocks)
    return torch.cat([_layer_bytes(layer, blocks, sequence.computed) for layer in store.layers], dim=1)


def _layer_bytes(layer: KVLayer, blocks: Tensor, tokens: int) -> Tensor:
    """[tokens, bytes]: all planes of a token's slot; of a sink the codes of its slots, and zeros to the same width."""
    by_slot = {
        name: plane[blocks].transpose(1, 2).flatten(0, 1).flatten(1).contiguous().view(torch.uint8)
        for name, plane in layer.planes.items()
    }
    plain = torch.cat([data[layer.lead : layer.lead + tokens] for data in by_slot.values()], dim=1)
    if not layer.format.sinks:
        return plain
    sinks = min(layer.format.sinks, tokens)
    codes = [by_slot[f"{side}.{next(iter(layer.side(side)))}"][: SINK_SPAN * sinks] for side in ("key", "value")]
    spread = torch.cat([data.unflatten(0, (sinks, SINK_SPAN)).flatten(1) for data in codes], dim=1)
    width = max(plain.shape[1], spread.shape[1])
    return torch.cat([F.pad(rows, (0, width - rows.shape[1])) for rows in (spread, plain[sinks:])])


def assert_same(outcome: Outcome, expected: Outcome) -> None:
    """The same tokens, for the same reasons, from the same cache bytes."""
    assert outcome.outputs == expected.outputs
    for request, twin in zip(outcome.requests, expected.requests, strict=True):
        assert [s.finish_reason for s in request.sequences] == [s.finish_reason for s in twin.sequences]
    assert outcome.kv.keys() == expected.kv.keys()
    for key, kv in outcome.kv.items():
        common = min(len(kv), len(expected.kv[key]))
        assert torch.equal(kv[:common], expected.kv[key][:common]), f"the KV of {key} differs"


def spy_on_requests(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """All requests that an engine takes from here on, in order."""
    taken: list[Request] = []
    submit = engine.submit

    def noting(*args: Any) -> Request:
        taken.append(submit(*args))
        return taken[-1]

    monkeypatch.setattr(engine, "submit", noting)
    return taken


def reasons(requests: List[Request]) -> list[str | None]:
    """Why each choice of each request ended in the engine."""
    return [sequence.finish_reason for request in requests for sequence in request.sequences]


def eventually(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait until a condition holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)
