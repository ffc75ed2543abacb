"""Steps that are launched before the tokens of the one before are known."""

from __future__ import annotations

import pytest

from kvant.config import SamplingParams
from kvant.engine.runner import Runner
from kvant.engine.sequence import Failure, Sampled
from kvant.errors import NotFiniteError
from tests.engine.drive import Ask, assert_same, core_of, drive, drive_alone, text
from tests.engine.simulation import Limits, Simulation

pytestmark = pytest.mark.usefixtures("single_thread")


def greedy(**changes: object) -> SamplingParams:
    return SamplingParams(**({"temperature": 0, "max_tokens": 20, "ignore_eos": True} | changes))


@pytest.fixture
def launches(monkeypatch) -> list[bool]:
    """For each step, whether it was launched before the tokens of the last were known."""
    seen: list[bool] = []
    launch = Runner.launch

    def watched(self, plan, after=None):
        seen.append(after is not None)
        return launch(self, plan, after)

    monkeypatch.setattr(Runner, "launch", watched)
    return seen


def test_all_but_a_prompts_own_step_are_launched_ahead(tiny_model, launches):
    core = core_of(tiny_model, async_scheduling=True)
    drive(core, [(text(1, 9), greedy()), (text(2, 30), greedy())])
    assert launches == [False] + [True] * 19


@pytest.mark.parametrize(
    "wish",
    [{"repetition_penalty": 1.3}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"min_tokens": 20}],
    ids=lambda wish: next(iter(wish)),
)
def test_a_distribution_that_depends_on_the_answer_so_far_waits_for_it(tiny_model, launches, wish):
    ask = [(text(1, 9), greedy(**wish))]
    outcome = drive(core_of(tiny_model, async_scheduling=True), ask)
    assert not any(launches)
    assert_same(outcome, drive_alone(tiny_model, ask))


def test_an_answer_that_ends_unforeseen_has_no_token_too_many(tiny_model, launches):
    """Its next token was computed already; nobody sees it, and nobody's cache."""
    whole = drive_alone(tiny_model, [(text(3, 20), greedy())]).requests[0].sequences[0].output
    stop = next(token for place, token in enumerate(whole) if place > 4 and token not in whole[:place])
    asks: list[Ask] = [
        (text(3, 20), greedy(stop_token_ids=[stop])),
        (text(3, 20), greedy(max_tokens=40)),
        (text(4, 31), greedy(max_tokens=40, temperature=1.1, seed=5, logprobs=2)),
    ]
    launches.clear()
    outcome = drive(core_of(tiny_model, async_scheduling=True), asks)
    assert outcome.requests[0].sequences[0].output == whole[: whole.index(stop) + 1]
    assert launches == [False] + [True] * 39, "the others do not wait for it"
    assert_same(outcome, drive_alone(tiny_model, asks))


def test_who_arrives_meanwhile_is_admitted_at_once(tiny_model, launches):
    core = core_of(tiny_model, async_scheduling=True)
    first = core.request(text(1, 9), greedy(), lambda *event: None)
    second = core.request(text(2, 9), greedy(), lambda *event: None)
    core.add(first)
    for _ in range(4):
        core.step()
    core.add(second)
    core.step()  # the one on its way
    core.step()
    assert len(second.sequences[0].output) == 1


def test_what_is_on_its_way_for_an_aborted_request_is_dropped(tiny_model, launches):
    core = core_of(tiny_model, async_scheduling=True)
    stays, goes = (core.request(text(seed, 9), greedy(), lambda *event: None) for seed in (1, 2))
    core.add(stays)
    core.add(goes)
    core.step()
    said = list(goes.sequences[0].output)
    core.abort(goes)
    while core.has_work():
        assert all(request is stays for request, _ in core.step())
    assert launches == [False] + [True] * 19
    assert goes.sequences[0].output == said
    assert core.stats().kv_blocks_used == 0
    expected = drive_alone(tiny_model, [(text(1, 9), greedy())]).requests[0].sequences[0].output
    assert stays.sequences[0].output == expected


def test_an_engine_whose_last_requests_were_aborted_comes_to_rest(tiny_model):
    core = core_of(tiny_model, async_scheduling=True)
    request = core.request(text(1, 9), greedy(), lambda *event: None)
    core.add(request)
    core.step()
    core.abort(request)
    assert core.has_work(), "a step is on its way"
    assert core.step() == []
    assert not core.has_work()


def test_what_is_not_finite_in_a_step_ahead_ends_its_own_request(tiny_model, monkeypatch):
    """Where the backend sees it while the step before is not committed: the tokens are those of another plan."""
    core = core_of(tiny_model, async_scheduling=True)
    fine, broken = (
        core.request(text(seed, length), greedy(), lambda *event: None) for seed, length in ((1, 9), (2, 30))
    )
    core.add(fine)
    core.add(broken)
    launch = Runner.launch

    def failing(self, plan, after=None):
        for token, row in enumerate(plan.rows):
            if row.sequence.request is broken and row.start > 32:
                raise NotFiniteError("by hand", [token])
        return launch(self, plan, after)

    monkeypatch.setattr(Runner, "launch", failing)
    events = [event for _ in range(8) for event in core.step()]
    assert [request for request, event in events if isinstance(event, Failure)] == [broken]
    assert len(broken.sequences[0].output) == 4
    while core.has_work():
        core.step()
    expected = drive_alone(tiny_model, [(text(1, 9), greedy())]).requests[0].sequences[0].output
    assert fine.sequences[0].output == expected


ROOMY = Limits(block_size=8, num_blocks=64, max_model_len=64, max_num_seqs=2, budget=64, caching=False)


def test_no_step_is_planned_beyond_an_answers_limit():
    sim = Simulation(ROOMY)
    sim.submit([1] * 5, max_tokens=2, stop_ids=frozenset())
    plan = sim.scheduler.plan()
    assert [(row.start, row.stop) for row in sim.scheduler.ahead(plan).rows] == [(5, 6)]
    sim.step()
    assert sim.scheduler.ahead(sim.scheduler.plan()) is None


def test_the_blocks_of_who_has_ended_may_be_anothers_in_the_next_step():
    """Though a token is still being written there: the device does one step after the other."""
    sim = Simulation(Limits(block_size=8, num_blocks=8, max_model_len=64, max_num_seqs=2, budget=64, caching=False))
    ends, stays = (sim.submit([1] * length, max_tokens=40, stop_ids=frozenset({9})) for length in (30, 31))
    first = sim.scheduler.plan()
    second = sim.scheduler.ahead(first)
    assert sim.pool.num_free == 0
    given = set(ends.sequences[0].blocks)
    sim.scheduler.commit(first, [Sampled(ends.sequences[0], 9), Sampled(stays.sequences[0], 1)])
    third = sim.scheduler.ahead(second)
    assert [(row.sequence, row.start, row.stop) for row in third.rows] == [(stays.sequences[0], 32, 33)]
    assert given.intersection(stays.sequences[0].blocks)


def test_a_block_is_taken_for_the_token_after():
    sim = Simulation(ROOMY)
    request = sim.submit([1] * 8, stop_ids=frozenset())
    plan = sim.scheduler.plan()
    assert len(request.sequences[0].blocks) == 1
    assert sim.scheduler.ahead(plan) is not None
    assert len(request.sequences[0].blocks) == 2


def test_where_blocks_run_out_the_tokens_are_waited_for():
    sim = Simulation(Limits(block_size=8, num_blocks=8, max_model_len=64, max_num_seqs=2, budget=80, caching=False))
    for _ in range(2):
        sim.submit([1] * 32, stop_ids=frozenset())
    plan = sim.scheduler.plan()
    assert sim.pool.num_free == 0
    assert sim.scheduler.ahead(plan) is None


def test_who_waits_without_hope_holds_nobody_up():
    """Until somebody ends: then there may be room."""
    sim = Simulation(ROOMY)
    ends, _, waits = (sim.submit([i] * 5, max_tokens=limit, stop_ids=frozenset()) for i, limit in enumerate((3, 30, 9)))
    plan = sim.scheduler.plan()
    assert (sim.scheduler.num_running, sim.scheduler.num_waiting) == (2, 1)
    assert sim.scheduler.ahead(plan) is not None
    sim.abort(ends)
    assert sim.scheduler.ahead(plan) is None
    sim.submit([7], stop_ids=frozenset())
    assert waits.scheduled is None


def test_no_step_goes_on_for_a_choice_that_was_aborted_meanwhile():
    """Though as many run as the step has: one of them had no share of it."""
    sim = Simulation(Limits(block_size=8, num_blocks=64, max_model_len=64, max_num_seqs=3, budget=2, caching=False))
    request = sim.submit([1, 2], n=3, stop_ids=frozenset())
    sim.step()
    plan = sim.scheduler.plan()
    assert [row.sequence.index for row in plan.rows] == [0, 1]
    sim.abort(request, 0)
    assert sim.scheduler.num_running == 2
    assert sim.scheduler.ahead(plan) is None
    sim.check_holders()
