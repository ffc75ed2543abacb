"""The process's one pool of threads: shared by whoever computes, idle when nobody does."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from kvant.config import EngineConfig, SamplingParams
from kvant.formats.kv import KV_FORMATS, KVPlan
from kvant.models import forcing
from kvant.models.decoder import Decoder
from kvant.models.forcing import force, new_store
from kvant.pipelines import pipeline
from kvant.weights.load import load_model
from tests.engine.checkpoint import write_checkpoint
from tests.engine.drive import text
from tests.support import NATIVE

Result = TypeVar("Result")
TEXTS = [text(seed, 80) for seed in range(4)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), hidden_size=64, intermediate_size=96)


@pytest.fixture
def _impatient() -> Iterator[None]:
    """Python's threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def states(decoder: Decoder, ids: list[int]) -> Tensor:
    plan = KVPlan.uniform(KV_FORMATS["fp32"], len(decoder.spec.layers))
    return force(decoder, new_store(decoder, plan, len(ids)), ids, len(ids))


def at_once(work: list[Callable[[], Result]]) -> list[Result]:
    """What each gives, on a thread of its own."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(one) for one in work]]


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("threads", [(2, 2, 2, 2), (1, 3, 2, 1)])
@pytest.mark.parametrize("shared", [False, True], ids=["a decoder each", "one decoder"])
def test_those_who_compute_at_once_do_not_disturb_each_other(native, path, monkeypatch, threads, shared):
    monkeypatch.setattr(forcing, "CHUNK", 1)  # many steps
    first = load_model(path, dtype="float32", ops=native(1)).decoder
    decoders = [first if shared else first.with_ops(native(count)) for count in threads]
    expected = [states(first, ids) for ids in TEXTS]
    found = at_once([lambda d=d, ids=ids: states(d, ids) for d, ids in zip(decoders, TEXTS, strict=True)])
    for mine, alone in zip(found, expected, strict=True):
        assert torch.equal(mine, alone)


def test_a_decoder_may_go_from_thread_to_thread(native, path):
    decoder = load_model(path, dtype="float32", ops=native(2)).decoder
    for ids in TEXTS:
        assert torch.equal(*(at_once([lambda ids=ids: states(decoder, ids)])[0] for _ in range(2)))


@pytest.mark.parametrize("isa", NATIVE)
def test_engines_share_the_process_and_rest_when_they_are_done(path, monkeypatch, isa):
    monkeypatch.setenv("KVANT_CPU_ISA", isa)
    config = EngineConfig(dtype="float32", kv_cache_dtype="fp32", max_model_len=120, num_kv_blocks=100)
    wish = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with pipeline(path, engine=config) as one, pipeline(path, engine=config) as other:
        expected = [[pipe(ids, wish).token_ids for ids in TEXTS] for pipe in (one, other)]
        assert expected[0] == expected[1]
        asked = at_once([lambda p=p, ids=ids: p(ids, wish).token_ids for p in (one, other) for ids in TEXTS])
        assert asked == [*expected[0], *expected[1]]
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.01
