"""A scheduler over a memory that knows what it should hold: every wrongly shared, stale or unwritten slot is seen."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass

from kvant.cache.blocks import BlockPool, Paging
from kvant.cache.prefix import PrefixTree
from kvant.config import SamplingParams
from kvant.engine.scheduler import Scheduler
from kvant.engine.sequence import Plan, Request, Row, Sampled, Sequence
from kvant.formats.kv import SINK_SPAN

STOP = 9
Fingerprint = tuple[Hashable, tuple[int, ...]]
Cells = list[Fingerprint | None]  # a block's, by offset


@dataclass(frozen=True)
class Limits:
    """What an engine would be configured with; its first `sinks` tokens are kept in 16 bit.

    Up to `max_steps` decode steps follow each other.
    """

    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    budget: int
    caching: bool
    sinks: int = 0
    swap_blocks: int = 0
    max_steps: int = 1

    @property
    def paging(self) -> Paging:
        return Paging(self.block_size, lead=self.sinks * (SINK_SPAN - 1))

    def slots(self, position: int) -> range:
        """The slots of a sequence that its token at `position` lies in, counted through its blocks."""
        if position < self.sinks:
            return range(position * SINK_SPAN, (position + 1) * SINK_SPAN)
        after = position - self.sinks
        return range(self.sinks * SINK_SPAN + after, self.sinks * SINK_SPAN + after + 1)

    def blocks(self, tokens: int) -> int:
        """Blocks that so many tokens lie in."""
        return self.slots(tokens - 1)[-1] // self.block_size + 1 if tokens else 0


def drawn(request: Request, index: int, position: int) -> int:
    """The token a choice samples at a place of its output: a pure function, so preemption must not change it.

    Mostly 0, so that the outputs of different choices and requests run together for a while.
    """
    return random.Random(f"{request.seed}/{index}/{position}").choice((0, 0, 0, 0, 1, STOP))


class Simulation:
    """Scheduler, pool, swap space and tree, driven like the engine drives them.

    `memory[block][offset]` holds, instead of KV, what KV depends on: the salt and all tokens up to that place. So does
    `swap_memory`. Both lose what nobody holds any more.

    Attributes:
        aborted: choices that were.
        interrupts: the share of a burst's steps after which it is ended from outside.
        recomputed: tokens that a sequence had to compute again.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks)
        self.tree = PrefixTree(self.pool, limits.paging) if limits.caching else None
        self.swap = BlockPool(limits.swap_blocks)
        self.scheduler = Scheduler(
            self.pool,
            self.tree,
            swap=self.swap,
            paging=limits.paging,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.budget,
            max_model_len=limits.max_model_len,
            max_steps=limits.max_steps,
        )
        self.interrupts = 0.1
        self._moods = random.Random(0)
        self.memory: dict[int, Cells] = {}
        self.swap_memory: dict[int, Cells] = {}
        self.requests: list[Request] = []
        self.aborted: set[Sequence] = set()
        self.recomputed = 0
        self._furthest: Counter[Sequence] = Counter()

    def submit(
        self,
        prompt: list[int],
        n: int = 1,
        max_tokens: int | None = None,
        salt: Hashable = None,
        may_reuse: bool = True,
        stop_ids: frozenset[int] = frozenset({STOP}),
    ) -> Request:
        """Queue a request; its number is its seed."""
        sampling = SamplingParams(n=n, max_tokens=max_tokens)
        seed = len(self.requests)
        request = Request(tuple(prompt), sampling, seed, lambda *event: None, stop_ids, salt)
        request.sequences[0].may_reuse = may_reuse
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def abort(self, request: Request, index: int | None = None) -> None:
        """Abort a request or a choice of it, and check that it is gone."""
        chosen = [s for s in request.sequences if index in (None, s.index)]
        live = [s for s in chosen if s.finish_reason is None]
        self.aborted.update(live)
        events = self.scheduler.abort(request, index)
        assert [(event.index, event.token_id, event.finish_reason) for event in events] == [
            (sequence.index, None, "abort") for sequence in live
        ]
        assert all(sequence.finish_reason is not None and not sequence.blocks for sequence in chosen)
        self._forget_what_is_free()

    def step(self) -> Plan:
        """One step, or a burst that ends early now and then, every promise of the plan checked."""
        plan = self.scheduler.plan()
        self._check_plan(plan)
        for step in range(plan.steps):
            part = plan.after(step)
            self._launch(part)
            self._commit(part)
            if any(row.sequence.finish_reason for row in part.rows) or self._moods.random() < self.interrupts:
                break
        return plan

    def _launch(self, plan: Plan) -> None:
        self._copy_blocks(plan)
        self._write(plan)
        for row in plan.rows:
            self._check_memory(self._text(row), row.sequence.request.salt, row.sequence.blocks, self.memory)

    def _commit(self, plan: Plan) -> None:
        sampled = [
            Sampled(sequence, drawn(sequence.request, sequence.index, len(sequence.output)))
            for row in plan.rows
            for sequence in row.samplers
        ]
        places = [(item.sequence, len(item.sequence.output)) for item in sampled if not item.sequence.finish_reason]
        events = self.scheduler.commit(plan, sampled)
        for (sequence, place), (request, event) in zip(places, events, strict=True):
            assert (request, event.index) == (sequence.request, sequence.index)
            assert event.token_id == drawn(request, event.index, place)
            assert event.finish_reason == sequence.finish_reason == expected_end(self.limits, sequence)
        self._forget_what_is_free()

    def fail(self) -> None:
        """A step that comes to nothing: it leaves rubbish where it should have computed, and a request of it ends."""
        plan = self.scheduler.plan()
        self._check_plan(plan)
        self._copy_blocks(plan)
        for row in plan.rows:
            for position in range(row.start, row.stop):
                for block, offset in self._places(position, row.sequence.blocks):
                    self.memory.setdefault(block, [None] * self.limits.block_size)[offset] = None
        self.abort(plan.rows[0].sequence.request)

    def finish(self) -> None:
        """Step until nothing is left to do; the bound is generous, so beyond it nothing moves."""
        work = sum(len(r.prompt) + self.limits.max_model_len * r.sampling.n for r in self.requests)
        for _ in range(50 + 20 * work):
            if not self.scheduler.has_work():
                return
            self.step()
            self.check_holders()
        raise AssertionError("the scheduler goes round in circles")

    def check_holders(self) -> None:
        """Every block has as many references as holders, and the free ones have none."""
        held = Counter(block for sequence in self.sequences for block in sequence.blocks)
        assert self.scheduler.blocks_used == len(held)
        known = list(self.tree.blocks()) if self.tree else []
        assert len(known) == len(set(known)), "two nodes of the tree share a block"
        held.update(known)
        references = [self.pool.references(block) for block in range(self.limits.num_blocks)]
        assert references == [held[block] for block in range(self.limits.num_blocks)]
        assert self.pool.num_free == references.count(0)
        self._check_swapped()
        for sequence in self.sequences:
            if sequence.swapped:
                continue
            needed = self.limits.blocks(sequence.computed)
            most = self.limits.blocks(sequence.total + self.limits.max_steps - 1)  # where a burst has ended early
            assert needed <= len(sequence.blocks) <= most
            assert sequence.finish_reason is None or not sequence.blocks

    def _check_swapped(self) -> None:
        """What is in the swap space has one holder, which waits for room, and is all that this one has computed."""
        held = [block for sequence in self.sequences for block in sequence.swapped]
        assert len(held) == len(set(held)) == self.limits.swap_blocks - self.swap.num_free
        for sequence in self.sequences:
            if sequence.swapped:
                assert sequence.finish_reason is None
                assert not sequence.blocks
                assert len(sequence.swapped) == self.limits.blocks(sequence.computed)
                tokens = sequence.tokens(0, sequence.computed)
                self._check_memory(tokens, sequence.request.salt, sequence.swapped, self.swap_memory)

    def check_known_prefixes(self) -> None:
        """What the tree says it knows of any text ever seen is what the memory holds."""
        for sequence in self.sequences if self.tree else ():
            tokens, salt = sequence.tokens(0, sequence.total), sequence.request.salt
            match = self.tree.match(tokens, salt)
            assert match.length <= len(tokens)
            self._check_memory(tokens[: match.length], salt, match.blocks, self.memory)

    @property
    def sequences(self) -> list[Sequence]:
        """All choices of all requests, finished ones too."""
        return [sequence for request in self.requests for sequence in request.sequences]

    def _check_plan(self, plan: Plan) -> None:
        assert plan.rows, "a plan must move something"
        assert plan.num_tokens <= self.limits.budget
        assert self.scheduler.num_running <= self.limits.max_num_seqs
        assert len({id(row.sequence) for row in plan.rows}) == len(plan.rows)
        for row in plan.rows:
            sequence = row.sequence
            assert sequence.finish_reason is None
            assert sequence.computed == row.start < row.stop <= sequence.total
            waiting = sequence.forks if row.stop == sequence.total else ()
            assert row.samplers == ((sequence, *waiting) if row.stop == sequence.total else ())
            if plan.steps > 1:
                assert row.samplers == (sequence,)
                assert 0 < len(sequence.output) <= sequence.request.limit - plan.steps

    def _copy_blocks(self, plan: Plan) -> None:
        for source, target in plan.swaps_out:
            self.swap_memory[target] = list(self.memory[source])
        for source, target in plan.copies:
            self.memory[target] = list(self.memory[source])
        for source, target in plan.swaps_in:
            self.memory[target] = list(self.swap_memory[source])

    def _forget_what_is_free(self) -> None:
        """Nobody may count on it."""
        self.memory = {block: cells for block, cells in self.memory.items() if self.pool.references(block)}
        self.swap_memory = {block: cells for block, cells in self.swap_memory.items() if self.swap.references(block)}

    def _write(self, plan: Plan) -> None:
        for row in plan.rows:
            self.recomputed += max(self._furthest[row.sequence] - row.start, 0)
            self._furthest[row.sequence] = row.stop
            tokens = self._text(row)
            for position in range(row.start, row.stop):
                for block, offset in self._places(position, row.sequence.blocks):
                    assert self.pool.references(block) == 1, "others would see this write"
                    cells = self.memory.setdefault(block, [None] * self.limits.block_size)
                    cells[offset] = (row.sequence.request.salt, tuple(tokens[: position + 1]))

    def _text(self, row: Row) -> list[int]:
        """All tokens up to the row's end; of a step ahead the last one is drawn, but not told yet."""
        sequence = row.sequence
        known = sequence.tokens(0, row.stop)
        return (
            known if len(known) == row.stop else [*known, drawn(sequence.request, sequence.index, len(sequence.output))]
        )

    def _check_memory(
        self, tokens: list[int], salt: Hashable, blocks: list[int] | tuple[int, ...], memory: dict[int, Cells]
    ) -> None:
        for position in range(len(tokens)):
            found = {memory[block][offset] for block, offset in self._places(position, blocks)}
            assert found == {(salt, tuple(tokens[: position + 1]))}

    def _places(self, position: int, blocks: list[int] | tuple[int, ...]) -> list[tuple[int, int]]:
        """Block and offset of each slot of a token."""
        size = self.limits.block_size
        return [(blocks[slot // size], slot % size) for slot in self.limits.slots(position)]


class Overlapped(Simulation):
    """The same, each step launched before the last one's tokens are told, where the scheduler can plan it."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._flight: Plan | None = None

    def step(self) -> Plan:
        plan = self._flight
        if plan is None:
            plan = self.scheduler.plan()
            self._check_plan(plan)
            self._launch(plan)
        self._flight = self.scheduler.ahead(plan)
        if self._flight is not None:
            assert self._flight.rows
            assert self._flight.num_tokens <= self.limits.budget
            assert all(row.sequence.finish_reason is None for row in self._flight.rows)
            self._launch(self._flight)
        self._commit(plan)
        return plan

    def fail(self) -> None:
        if self._flight is None:
            super().fail()


def expected_end(limits: Limits, sequence: Sequence) -> str | None:
    """Why an output ends here, or None, from what was asked alone."""
    if sequence.output[-1] in sequence.request.stop_ids:
        return "stop"
    full = sequence.total >= limits.max_model_len
    return "length" if full or len(sequence.output) == sequence.request.sampling.max_tokens else None


def expected_output(limits: Limits, request: Request, index: int) -> list[int]:
    """What a choice says when nobody aborts it."""
    room = limits.max_model_len - len(request.prompt)
    most = min(room, request.sampling.max_tokens or room)
    output: list[int] = []
    while len(output) < most and not request.stop_ids.intersection(output):
        output.append(drawn(request, index, len(output)))
    return output
