"""Recorded steps give what launched ones give: padding, tables and numbers are all in place.

Here "recording" keeps the function, and "replaying" calls it, on the fixed memory.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvant.cache.store import KVStore, SwapSpace
from kvant.config import SamplingParams, StepLimits
from kvant.engine.batch import Batch
from kvant.engine.core import Core
from kvant.engine.decode_graphs import batch_sizes
from kvant.engine.graphs import StepGraphs
from kvant.engine.prompt_graphs import most_prompts, prompt_sizes, starts_of
from kvant.engine.runner import Runner
from kvant.kernels.reference import ReferenceOps
from tests.engine.drive import PLANS, Ask, assert_same, core_of, drive, text

pytestmark = pytest.mark.usefixtures("single_thread")


def test_sizes_are_close_where_padding_costs_most():
    assert batch_sizes(1) == (1,)
    assert batch_sizes(6) == (1, 2, 4, 6)
    assert batch_sizes(50) == (1, 2, 4, 8, 16, 32, 48, 50)


def test_a_prompt_has_room_beside_as_many_sequences_as_half_of_its_tokens():
    assert prompt_sizes(31, 8) == {}
    assert prompt_sizes(200, 40) == {32: 16, 64: 32, 128: 40, 192: 40}


@pytest.mark.parametrize(
    ("size", "sequences", "prompts"), [(32, 16, 2), (192, 40, 12), (256, 8, 8), (64, 1, 1), (64, 2, 2)]
)
def test_a_step_has_a_prompt_for_every_sixteen_of_its_tokens(size, sequences, prompts):
    assert most_prompts(size, sequences) == prompts
    starts = starts_of(size, sequences)
    counts = [stop - start for start, stop in pairwise(starts)]
    assert (starts[0], starts[-1], len(counts)) == (0, size, sequences)
    assert sum(count > 1 for count in counts) == max(1, min(prompts, sequences - 1))
    assert max(counts) > size // 2  # how attention is launched depends on it
    assert (1 in counts) == (sequences > 1)  # else nothing would be launched for one


def test_more_prompts_than_a_step_was_recorded_for_take_a_larger_one(tiny_model):
    """Attention launches programs for so many prompts, and no others would be attended to."""
    calls: list[int] = []
    core = recording(core_of(tiny_model, max_num_seqs=8), calls, 8, 64)
    graphs = core._runner._graphs._prompts

    def batch_of(*counts: int) -> Batch:
        attention = SimpleNamespace(context_lens=counts, query_starts=(0, *accumulate(counts)))
        return SimpleNamespace(ids=range(sum(counts)), attention=attention)

    batches = [batch_of(*counts) for counts in ((20,), (2, 2), (2, 2, 2), (2, 2, 2, 2, 2), (30, 1, 1), (31, 1, 1))]
    assert [graphs._size(batch, []) for batch in batches] == [32, 32, 64, None, 32, 64]


class OfTensors(ReferenceOps):
    """As kernels see a batch: what is where stands in tensors, the tuples are of the recording."""

    def attention(self, q, cache, batch, shape):
        starts, lengths = tuple(batch.starts.tolist()), tuple(batch.lengths.tolist())
        out = super().attention(q, cache, replace(batch, query_starts=starts, context_lens=lengths), shape)
        out[starts[-1] :] = 0  # of nobody's tokens: anything, but the reference stops at what is not finite
        return out


def recording(core: Core, calls: list[int], sequences: int, tokens: int = 0) -> Core:
    """The core, its steps of so many sequences recorded, those with prompts up to so many tokens."""
    decoder, store = core._model.decoder, core.store
    if type(decoder.ops) is ReferenceOps:
        decoder = decoder.with_ops(OfTensors())
    # One more block, as the core itself has it where it records.
    blocks = torch.cat([store.blocks, torch.zeros_like(store.blocks[:1])])
    larger = KVStore.allocate(
        decoder.spec.kv_shape, core.memory.plan, len(blocks), core.memory.block_size, decoder.ops.device
    )
    core.store = larger

    def record(function):
        def replay():
            calls.append(1)
            function()

        function()
        return replay

    graphs = StepGraphs(
        decoder,
        larger,
        spare_block=len(blocks) - 1,
        limits=StepLimits(sequences, tokens, overlapping=False),
        max_model_len=core.max_model_len,
        recorder=record,
    )
    core._runner = Runner(decoder, larger, SwapSpace(larger, 0), graphs)
    return core


def asks() -> list[Ask]:
    lengths = (1, 7, 8, 40, 90)
    kinds = ({"temperature": 0}, {"temperature": 1.2, "seed": 3}, {"temperature": 0, "logprobs": 3})
    return [
        (text(seed, length), SamplingParams(**kinds[seed % 3], max_tokens=10 + seed, ignore_eos=True))
        for seed, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("tokens", [0, 64])
@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("plan", ["fp32", "int8", "mixed"])
def test_recorded_steps_give_what_launched_ones_give(tiny_model, plan, overlapping, tokens, monkeypatch):
    settings = {"enable_prefix_caching": False, "max_num_seqs": 8, "async_scheduling": overlapping}
    settings |= {"max_num_batched_tokens": 60}
    calls: list[int] = []
    expected = drive(core_of(tiny_model, PLANS[plan], **settings), asks())
    core = recording(core_of(tiny_model, PLANS[plan], **settings), calls, 8, tokens)
    if tokens:
        monkeypatch.delattr(Batch, "to")  # what is launched would be sent
    outcome = drive(core, asks())
    assert_same(outcome, expected)
    assert len(calls) >= 13
    for mine, request in zip(outcome.requests, asks(), strict=True):
        assert (request[1].logprobs is None) == (mine.sampling.logprobs is None)


def test_batches_larger_than_recorded_and_prompts_are_launched(tiny_model):
    calls: list[int] = []
    core = recording(core_of(tiny_model, max_num_seqs=8), calls, 2)
    several = drive(core, [(text(seed, 5), replace(asks()[0][1], max_tokens=6)) for seed in range(3)])
    assert not calls
    assert all(len(request.sequences[0].output) == 6 for request in several.requests)


def test_what_is_beyond_the_batch_is_written_into_nobodys_block(tiny_model):
    """Three sequences run as a batch of four; every block but theirs stays as it was."""
    core = recording(core_of(tiny_model, PLANS["mixed"], max_num_seqs=4, enable_prefix_caching=False), [], 4)
    requests = [core.request(text(seed, 9), asks()[0][1], lambda *event: None) for seed in range(3)]
    for request in requests:
        core.add(request)
    core.step()
    before = core.store.blocks.clone()
    core.step()
    changed = {int(block) for block in (core.store.blocks != before).any(1).nonzero()}
    held = {block for request in requests for block in request.sequences[0].blocks}
    assert changed <= held | {len(before) - 1}


def test_numbers_that_are_not_finite_are_seen(tiny_model):
    """A backend that cannot stop leaves a mark beside the token; here the mark is made by hand."""
    from kvant.errors import NotFiniteError

    calls: list[int] = []
    core = recording(core_of(tiny_model, max_num_seqs=4), calls, 4)
    run = core._runner._graphs.run

    def marked(batch, ends, ids):
        found = run(batch, ends, ids)
        if found is not None:
            found[1][1] = 1
        return found

    core._runner._graphs.run = marked
    requests = [core.request(text(seed, 9), asks()[0][1], lambda *event: None) for seed in range(3)]
    for request in requests:
        core.add(request)
    core.step()
    [(request, failure)] = core.step()
    assert request is requests[1]
    assert isinstance(failure.error, NotFiniteError)
    assert calls


class Seen(TorchDispatchMode):
    """Notes where the memory lies that a function finds, not what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()
        self._made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.lift_fresh.default:  # a tensor that `torch.tensor` has just made
            self.found |= places((args, kwargs)) - self._made
        out = func(*args, **(kwargs or {}))
        self._made |= places(out) - self.found
        return out


def places(tree: object) -> set[int]:
    """Where the memory of the tensors in it lies."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def test_the_memory_that_a_graph_was_recorded_on_is_kept(tiny_model):
    """A CUDA graph has addresses and keeps nothing alive; whoever frees what it reads gives it to somebody else."""
    core, seen = core_of(tiny_model, max_num_seqs=2), Seen()

    def record(function):
        with seen:
            function()
        return lambda: None

    graphs = StepGraphs(
        core._model.decoder,
        core.store,
        spare_block=0,
        limits=StepLimits(2, 64, overlapping=False),
        max_model_len=core.max_model_len,
        recorder=record,
    )
    gc.collect()
    assert graphs._decodes.sizes == (1, 2)
    assert len(seen.found) > 20
    assert seen.found <= places([one for one in gc.get_objects() if type(one) is torch.Tensor])
