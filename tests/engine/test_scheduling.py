"""The scheduler's promises one by one, in situations made to measure."""

from __future__ import annotations

import pytest

from kvant.engine.sequence import Plan, Request
from tests.engine.simulation import Limits, Simulation

ENDLESS: frozenset[int] = frozenset()
ROOMY = Limits(block_size=8, num_blocks=64, max_model_len=64, max_num_seqs=8, budget=64, caching=True)


def simulation(**changes: int | bool) -> Simulation:
    return Simulation(Limits(**{**vars(ROOMY), **changes}))


def shares(plan: Plan) -> list[tuple[Request, int, int]]:
    """Who computes what in a step."""
    return [(row.sequence.request, row.start, row.stop) for row in plan.rows]


def test_a_long_prompt_is_split_and_decodes_go_on_beside_it():
    sim = simulation(budget=10)
    short = sim.submit([1, 2, 3], max_tokens=9)
    assert shares(sim.step()) == [(short, 0, 3)]
    long = sim.submit([4] * 25)
    assert shares(sim.step()) == [(short, 3, 4), (long, 0, 9)]
    assert shares(sim.step()) == [(short, 4, 5), (long, 9, 18)]


def test_prompts_come_in_order_of_arrival():
    sim = simulation(budget=16, max_num_seqs=3)
    requests = [sim.submit([i] * 10, max_tokens=5) for i in range(4)]
    assert shares(sim.step()) == [(requests[0], 0, 10), (requests[1], 0, 6)]
    assert shares(sim.step()) == [(requests[0], 10, 11), (requests[1], 6, 10), (requests[2], 0, 10)]
    assert (sim.scheduler.num_running, sim.scheduler.num_waiting) == (3, 1)


def test_choices_wait_for_their_prompt_and_count_from_the_start():
    sim = simulation(budget=4, max_num_seqs=4)
    request = sim.submit([7] * 7, n=3, max_tokens=3)
    other = sim.submit([8], n=2)
    assert (sim.scheduler.num_running, sim.scheduler.num_waiting) == (0, 5)
    assert sim.step().rows[0].samplers == ()
    assert (sim.scheduler.num_running, sim.scheduler.num_waiting) == (3, 2)
    assert sim.step().rows[0].samplers == request.sequences
    assert all(sequence.blocks == request.sequences[0].blocks for sequence in request.sequences)
    assert len(sim.step().copies) == 2, "the last to write into the shared block needs no copy"
    assert other.scheduled is None


@pytest.mark.parametrize(("blocks", "running"), [(10, 8), (11, 9)])
def test_who_is_admitted_leaves_room_to_grow_into(blocks, running):
    """A quarter of a block for each of eight that run: with two free blocks the ninth waits, with three it comes."""
    sim = simulation(num_blocks=blocks, max_model_len=40, max_num_seqs=16, caching=False)
    for prompt in range(9):
        sim.submit([prompt] * 4, max_tokens=20, stop_ids=ENDLESS)
    sim.step()
    assert sim.scheduler.num_running == running
    sim.finish()


def test_the_latest_arrival_makes_room_and_goes_on_later_with_the_output_it_had():
    sim = simulation(num_blocks=8, caching=False)
    first, second = (sim.submit([i] * 30, max_tokens=30, stop_ids=ENDLESS) for i in range(2))
    while not sim.scheduler.preemptions:
        sim.step()
    assert (len(first.sequences[0].blocks), len(second.sequences[0].blocks)) == (5, 0)
    output = list(second.sequences[0].output)
    while first.sequences[0].finish_reason is None:
        assert shares(sim.step())[0][0] is first
    assert second.sequences[0].output == output
    assert shares(sim.step()) == [(second, 0, 30 + len(output))]
    assert sim.scheduler.preemptions == 1


def test_what_was_swapped_out_goes_on_where_it_was():
    sim = simulation(num_blocks=8, caching=False, swap_blocks=5)
    first, second = (sim.submit([i] * 30, max_tokens=30, stop_ids=ENDLESS) for i in range(2))
    while not sim.scheduler.preemptions:
        plan = sim.step()
    [sequence] = second.sequences
    computed = sequence.computed
    assert (sequence.total, len(sequence.blocks), len(sequence.swapped)) == (computed + 1, 0, 4)
    assert [target for _, target in plan.swaps_out] == sequence.swapped
    assert (sim.swap.num_free, sim.scheduler.swaps) == (1, 1)
    while first.sequences[0].finish_reason is None:
        sim.step()
    plan = sim.step()
    assert shares(plan) == [(second, computed, computed + 1)]
    assert [target for _, target in plan.swaps_in] == list(sequence.blocks[:4])
    assert (sim.swap.num_free, sequence.swapped) == (5, [])
    sim.finish()
    assert sim.recomputed == 0


def test_a_prompt_in_pieces_is_swapped_too():
    sim = simulation(num_blocks=8, budget=8, swap_blocks=8)
    sim.submit([0] * 22, max_tokens=4, stop_ids=ENDLESS)
    second = sim.submit([1] * 39)
    while not sim.scheduler.preemptions:
        sim.step()
    computed = second.sequences[0].computed
    assert 0 < computed < 39
    resumed = next(start for _ in range(9) for who, start, _ in shares(sim.step()) if who is second)
    assert resumed == computed


def test_where_not_all_of_it_fits_nothing_is_swapped():
    sim = simulation(num_blocks=8, caching=False, swap_blocks=3)
    second = [sim.submit([i] * 30, max_tokens=30, stop_ids=ENDLESS) for i in range(2)][1].sequences[0]
    while not sim.scheduler.preemptions:
        assert sim.step().swaps_out == ()
    assert (second.swapped, second.computed, sim.scheduler.swaps) == ([], 0, 0)
    sim.finish()
    assert sim.recomputed > 30


def test_an_aborted_text_leaves_the_swap_space():
    sim = simulation(num_blocks=8, caching=False, swap_blocks=4)
    second = [sim.submit([i] * 30, max_tokens=30, stop_ids=ENDLESS) for i in range(2)][1]
    while not sim.scheduler.swaps:
        sim.step()
    assert sim.swap.num_free == 0
    sim.abort(second)
    assert sim.swap.num_free == 4
    sim.finish()


def test_a_block_that_was_swapped_out_may_be_copied_into_at_once():
    """A choice that ended left its last block to the tree, so the other copies it: where a later arrival just was."""
    sim = simulation(num_blocks=3, max_model_len=24, swap_blocks=1)
    request, late = sim.submit([0] * 12, n=2, stop_ids=ENDLESS), sim.submit([1] * 3, stop_ids=ENDLESS)
    sim.step()
    sim.abort(request, 1)
    [shared, given] = request.sequences[0].blocks[1], late.sequences[0].blocks[0]
    plan = sim.step()
    assert (plan.swaps_out, plan.copies) == (((given, 0),), ((shared, given),))
    sim.finish()


def test_a_block_that_is_copied_may_be_swapped_into_at_once():
    """Once `third` has copied the block it shares with the tree, that may be evicted for `last`."""
    sim = simulation(num_blocks=6, max_model_len=40, swap_blocks=1)
    first, second = sim.submit([0] * 21, stop_ids=ENDLESS), sim.submit([1] * 4, stop_ids=ENDLESS)
    sim.step()
    third, last = sim.submit([0] * 18 + [1], stop_ids=ENDLESS), sim.submit([2] * 3, stop_ids=ENDLESS)
    while sim.scheduler.preemptions < 2:
        sim.step()
    assert (third.sequences[0].computed, last.sequences[0].swapped) == (0, [0])
    known = first.sequences[0].blocks[2]
    sim.abort(first)
    plan = sim.step()
    assert shares(plan)[1:] == [(third, 18, 23), (last, 5, 6)]
    assert ([source for source, _ in plan.copies], plan.swaps_in) == ([known], ((0, known),))
    assert second.sequences[0].finish_reason is None
    sim.finish()


def test_a_finished_text_serves_a_longer_one_to_its_last_computed_token():
    sim = simulation()
    first = sim.submit([1, 2, 3] * 5, max_tokens=1)
    sim.finish()
    second = sim.submit([*first.prompt, *first.sequences[0].output, 4, 5])
    plan = sim.step()
    assert shares(plan) == [(second, 15, 18)]
    assert len(plan.copies) == 1, "the last block is partly filled: it is copied before it is written"
    assert (first.cached_tokens, second.cached_tokens) == (0, 15)


def test_the_whole_of_a_known_prompt_is_never_reused():
    sim = simulation()
    sim.submit([1] * 16, max_tokens=1)
    sim.finish()
    again = sim.submit([1] * 16, max_tokens=1)
    assert shares(sim.step()) == [(again, 15, 16)]


def test_what_a_request_finds_of_its_own_after_preemption_is_not_called_cached():
    sim = simulation(num_blocks=8, budget=8)
    sim.submit([0] * 22, max_tokens=4, stop_ids=ENDLESS)
    second = sim.submit([1] * 39)
    while not sim.scheduler.preemptions:
        sim.step()
    assert second.sequences[0].computed == 0
    resumed = next(start for _ in range(9) for who, start, _ in shares(sim.step()) if who is second)
    assert resumed > 0, "nothing was found again: the test proves nothing"
    assert second.cached_tokens == 0


def test_blocks_that_were_found_but_are_in_the_way_do_not_count_as_cached():
    """The pool holds one sequence only, and copying its partly known last block would take one more."""
    sim = simulation(num_blocks=2, max_model_len=16)
    sim.submit([1] * 12, max_tokens=1)
    sim.finish()
    again = sim.submit([1] * 12 + [2])
    plan = sim.step()
    assert again.cached_tokens == plan.rows[0].start


def test_a_choice_alone_with_a_block_that_the_tree_shares_starts_over():
    """The choice that ended left its last block to the tree, and a pool of one sequence has no block for a copy."""
    alone = 0
    for stop in range(2):
        sim = simulation(num_blocks=2, max_model_len=16)
        request = sim.submit([0] * 12, n=2, stop_ids=frozenset({stop}))
        sim.step()
        if [sequence.finish_reason for sequence in request.sequences] in (["stop", None], [None, "stop"]):
            alone += 1
            assert shares(sim.step()) == [(request, 0, 13)]
        sim.finish()
    assert alone > 0


def test_a_choice_alone_with_such_a_block_goes_on_with_its_copy_from_the_swap_space():
    sim = simulation(num_blocks=2, max_model_len=16, swap_blocks=2)
    request = sim.submit([0] * 12, n=2, stop_ids=ENDLESS)
    sim.step()
    sim.abort(request, 1)
    plan = sim.step()
    assert shares(plan) == [(request, 12, 13)]
    assert sorted(source for source, _ in plan.swaps_out) == sorted(target for _, target in plan.swaps_in) == [0, 1]
    sim.finish()


def test_a_block_that_was_found_partly_filled_is_known_once_it_is_full():
    sim = simulation()
    sim.submit([1] * 12, max_tokens=1)
    sim.finish()
    first = sim.submit([1] * 12 + [2] * 9)
    sim.step()
    second = sim.submit([1] * 12 + [2] * 9)
    sim.step()
    assert (first.cached_tokens, second.cached_tokens) == (12, 16)


def test_an_aborted_leader_leaves_its_prompt_to_the_next_choice():
    sim = simulation(budget=4)
    request = sim.submit([3] * 9, n=3, max_tokens=2)
    sim.step()
    sim.abort(request, 0)
    sim.check_holders()
    assert (sim.scheduler.num_running, sim.scheduler.num_waiting) == (0, 2)
    sim.abort(request, 2)
    sim.finish()
    assert [len(sequence.output) for sequence in request.sequences] == [0, 2, 0]
    assert request.sequences[0].forks == request.sequences[1].forks == ()


def test_an_aborted_text_is_known_to_its_last_computed_token():
    """A stop string ends a text as an abort; the next turn goes on from there."""
    sim = simulation()
    request = sim.submit([5] * 13)
    sim.step()
    sim.abort(request)
    assert sim.tree is not None
    assert sim.tree.match([5] * 13).length == 13


def test_sinks_take_the_slots_of_more_tokens():
    """Two sinks fill a block of 8 slots, one leaves room for four tokens more."""
    for sinks, tokens, blocks in ((2, 2, 1), (2, 3, 2), (2, 10, 2), (2, 11, 3), (1, 5, 1), (1, 6, 2), (0, 8, 1)):
        sim = simulation(sinks=sinks)
        request = sim.submit([1] * tokens, stop_ids=ENDLESS)
        sim.step()
        assert len(request.sequences[0].blocks) == blocks


def test_a_text_that_parts_within_the_sinks_copies_them():
    """The copy keeps those in common; the rest of the first block is written anew, the other's sinks among it."""
    sim = simulation(block_size=16, sinks=4)
    first = sim.submit([1, 2, 3, 4, 5, 6], stop_ids=ENDLESS)
    sim.step()
    [known, _] = first.sequences[0].blocks
    other = sim.submit([1, 2, 9, 9, 9, 9], stop_ids=ENDLESS)
    plan = sim.step()
    assert shares(plan) == [(first, 6, 7), (other, 2, 6)]
    assert plan.copies == ((known, other.sequences[0].blocks[0]),)
    assert known == first.sequences[0].blocks[0]


def test_sinks_that_fill_a_block_are_shared_without_a_copy():
    sim = simulation(block_size=16, sinks=4)
    first = sim.submit([1, 2, 3, 4, 5], stop_ids=ENDLESS)
    sim.step()
    other = sim.submit([1, 2, 3, 4, 9, 9], stop_ids=ENDLESS)
    plan = sim.step()
    assert (shares(plan)[1], plan.copies) == ((other, 4, 6), ())
    assert other.sequences[0].blocks[0] == first.sequences[0].blocks[0]


def test_choices_of_a_prompt_shorter_than_the_sinks_write_theirs_apart():
    sim = simulation(block_size=16, sinks=4)
    request = sim.submit([7, 7], n=3, max_tokens=9, stop_ids=ENDLESS)
    sim.step()
    assert len({sequence.blocks[0] for sequence in request.sequences}) == 1
    assert len(sim.step().copies) == 2
    assert len({sequence.blocks[0] for sequence in request.sequences}) == 3
    sim.finish()


def burst(sim: Simulation) -> int:
    """The next plan's steps, all of which are done."""
    sim.interrupts = 0
    return sim.step().steps


def test_a_burst_ends_with_the_first_answer_that_is_at_its_limit():
    sim = simulation(max_steps=8)
    sim.submit([0] * 6, max_tokens=30, stop_ids=ENDLESS)
    sim.submit([0] * 9, max_tokens=13, stop_ids=ENDLESS)
    assert [burst(sim) for _ in range(6)] == [1, 8, 4, 8, 8, 1]
    assert not sim.scheduler.has_work()


def test_a_burst_is_as_long_as_the_blocks_last():
    """Nobody is preempted for its later steps, only for the one that has to be."""
    sim = simulation(num_blocks=5, max_model_len=40, max_steps=8, caching=False)
    for _ in range(2):
        sim.submit([0] * 6, max_tokens=20, stop_ids=ENDLESS)
    assert [burst(sim) for _ in range(3)] == [1, 8, 2]
    assert sim.scheduler.preemptions == 0
    assert burst(sim) == 1
    assert sim.scheduler.preemptions == 1


def test_who_may_be_admitted_is_not_kept_waiting_by_a_burst():
    sim = simulation(max_steps=8, max_num_seqs=2, budget=8, caching=False)
    sim.submit([0] * 6, stop_ids=ENDLESS)
    assert [burst(sim) for _ in range(2)] == [1, 8]
    sim.submit([0] * 20, max_tokens=4, stop_ids=ENDLESS)
    assert [burst(sim) for _ in range(3)] == [1, 1, 1], "its prompt takes three steps"
    sim.submit([0] * 6, stop_ids=ENDLESS)
    assert burst(sim) == 3, "no place is left for a third"
    assert burst(sim) == 1
