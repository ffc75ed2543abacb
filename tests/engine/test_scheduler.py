"""The scheduler and the cache under random arrivals, aborts and forks, in pools that are far too small."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engine.simulation import STOP, Limits, Overlapped, Simulation, expected_output

FEW = settings(
    max_examples=150,
    stateful_step_count=40,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
AMPLE = 10_000  # blocks of swap space, for more sequences than any of these tests has
MANY = settings(FEW, max_examples=1500, stateful_step_count=80)


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    """Pools from exactly one sequence of full length upwards."""
    block_size, sinks = draw(st.sampled_from(((8, 0), (16, 0), (8, 1), (8, 2), (16, 3), (16, 4))))
    max_model_len = draw(st.sampled_from((2, 4, 5, 9, 16, 17, 20, 21, 23, 24, 33, 36, 40)))
    spare = draw(st.sampled_from((0, 0, 1, 2, 4, 8)))
    return Limits(
        block_size=block_size,
        num_blocks=-(-(max_model_len + 3 * sinks) // block_size) + spare,
        max_model_len=max_model_len,
        sinks=sinks,
        swap_blocks=draw(st.sampled_from((0, 1, 3, 6, AMPLE, AMPLE))),
        max_num_seqs=draw(st.sampled_from((1, 2, 3, 5, 8))),
        budget=draw(st.sampled_from((1, 3, 8, 16, 33, 64, 100))),
        caching=draw(st.sampled_from((True, True, True, False))),
        max_steps=draw(st.sampled_from((1, 1, 2, 5, 20))),
    )


@st.composite
def narrow(draw: st.DrawFn) -> Limits:
    """Many long sequences in a pool with room for hardly more than one: somebody always has to make room."""
    block_size, sinks = draw(st.sampled_from(((8, 0), (8, 1), (8, 2), (16, 3))))
    max_model_len = draw(st.sampled_from((24, 33, 40)))
    return Limits(
        block_size=block_size,
        num_blocks=-(-(max_model_len + 3 * sinks) // block_size) + draw(st.integers(0, 3)),
        max_model_len=max_model_len,
        sinks=sinks,
        swap_blocks=draw(st.sampled_from((3, 6, AMPLE))),
        max_num_seqs=draw(st.sampled_from((4, 8))),
        budget=draw(st.sampled_from((8, 16, 100))),
        caching=draw(st.sampled_from((True, True, True, False))),
        max_steps=draw(st.sampled_from((1, 1, 2, 5, 20))),
    )


class Traffic(RuleBasedStateMachine):
    """Whatever may come, in whatever order."""

    simulation: Simulation

    @initialize(limits=limits())
    def start(self, limits: Limits) -> None:
        self.simulation = Simulation(limits)

    @rule(data=st.data(), n=st.integers(1, 4), max_tokens=st.none() | st.integers(1, 20), twice=st.booleans())
    def arrive(self, data: st.DataObject, n: int, max_tokens: int | None, twice: bool) -> None:
        prompt = self._prompt(data)
        for _ in range(1 + twice):
            self.simulation.submit(
                prompt,
                n=min(n, self.simulation.limits.max_num_seqs),
                max_tokens=max_tokens,
                salt=data.draw(st.sampled_from((None, None, None, "salt"))),
                may_reuse=data.draw(st.sampled_from((True, True, True, False))),
                stop_ids=data.draw(st.sampled_from((frozenset({STOP}), frozenset()))),
            )

    def _prompt(self, data: st.DataObject) -> list[int]:
        """Often the beginning of a text that was there before, with a few tokens more."""
        texts = [sequence.tokens(0, sequence.total) for sequence in self.simulation.sequences]
        text = data.draw(st.sampled_from([[0] * 40, *texts]))
        start = text[: data.draw(st.sampled_from((0, 1, 2, 3, 4, 5, 8, 9, 10, 16, 20, len(text))))]
        prompt = start + data.draw(st.lists(st.sampled_from((0, 1)), min_size=not start, max_size=12))
        return prompt[: self.simulation.limits.max_model_len - 1]

    @rule(steps=st.integers(1, 8))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.simulation.scheduler.has_work():
                self.simulation.step()
                self.simulation.check_holders()

    @precondition(lambda self: self.simulation.requests)
    @rule(data=st.data(), whole=st.booleans())
    def abort(self, data: st.DataObject, whole: bool) -> None:
        requests = self.simulation.requests
        swapped = [request for request in requests if any(sequence.swapped for sequence in request.sequences)]
        request = data.draw(st.sampled_from(requests) | st.sampled_from(swapped or requests))
        index = None if whole else data.draw(st.integers(0, request.sampling.n - 1))
        self.simulation.abort(request, index)

    @precondition(lambda self: self.simulation.scheduler.has_work())
    @rule()
    def fail(self) -> None:
        self.simulation.fail()

    @invariant()
    def nothing_leaks(self) -> None:
        self.simulation.check_holders()

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        simulation = self.simulation
        simulation.finish()
        simulation.check_known_prefixes()
        assert simulation.scheduler.blocks_used == simulation.scheduler.num_running == 0
        for request in simulation.requests:
            for sequence in request.sequences:
                whole = expected_output(simulation.limits, request, sequence.index)
                aborted = sequence in simulation.aborted
                assert sequence.output == (whole[: len(sequence.output)] if aborted else whole)
                assert (sequence.finish_reason == "abort") == aborted
        if simulation.tree is not None:
            simulation.tree.clear()
        assert simulation.pool.num_free == simulation.limits.num_blocks
        assert simulation.swap.num_free == simulation.limits.swap_blocks
        self._check_swapping()

    def _check_swapping(self) -> None:
        scheduler, room = self.simulation.scheduler, self.simulation.limits.swap_blocks
        assert 0 <= scheduler.swaps <= scheduler.preemptions
        if room == 0:
            assert scheduler.swaps == 0
        if room == AMPLE:
            assert (scheduler.swaps, self.simulation.recomputed) == (scheduler.preemptions, 0)


class Crowd(Traffic):
    """The same, where swapping is the rule."""

    @initialize(limits=narrow())
    def start(self, limits: Limits) -> None:
        super().start(limits)


class Overlap(Traffic):
    """The same, a step ahead."""

    @initialize(limits=limits())
    def start(self, limits: Limits) -> None:
        self.simulation = Overlapped(limits)


TestTraffic = Traffic.TestCase
TestTraffic.settings = FEW
TestCrowd = Crowd.TestCase
TestCrowd.settings = FEW
TestOverlap = Overlap.TestCase
TestOverlap.settings = FEW


@pytest.mark.slow
class TestMuchTraffic(Traffic.TestCase):  # type: ignore[name-defined, misc]
    settings = MANY


@pytest.mark.slow
class TestMuchOverlap(Overlap.TestCase):  # type: ignore[name-defined, misc]
    settings = MANY


@pytest.mark.slow
class TestGreatCrowd(Crowd.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(MANY, max_examples=500)
