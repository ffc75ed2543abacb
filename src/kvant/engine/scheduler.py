"""Which sequence computes which tokens, in which blocks. Plain integers: no tensor comes here.

A sequence has `computed` and `total` tokens; a plan lets `computed` catch up within a token budget. Prefill, chunked
prefill, decode, prefix-cache hits and preemption are that one rule.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Collection, Iterable

from kvant.cache.blocks import BlockPool, Paging
from kvant.cache.prefix import PrefixTree
from kvant.engine.outputs import FinishReason
from kvant.engine.sequence import Draft, Plan, Request, Row, Sampled, Sequence, TokenEvent

# Blocks that are left for each running sequence to grow into when another is admitted. Without, chats that fill a cache
# make room for each other so often that a third of all tokens is computed again; with a whole one, a tenth fewer run.
_SPARE = 0.25


class Scheduler:
    """Running sequences in order of arrival, and a queue of those that wait for room.

    Args:
        pool: the blocks; it must hold at least `max_model_len` tokens, so that one sequence can always run.
        tree: known prefixes in these blocks, or None to share nothing between requests.
        swap: blocks of the swap space, for what preempted sequences have computed; none where it is off.
        paging: where a sequence's tokens lie in its blocks.
        max_num_seqs: sequences that may run at once.
        max_num_batched_tokens: budget of a step.
        max_model_len: longest sequence.
        max_steps: decode steps of a plan.
    """

    def __init__(
        self,
        pool: BlockPool,
        tree: PrefixTree | None,
        *,
        swap: BlockPool,
        paging: Paging,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        max_steps: int = 1,
    ) -> None:
        self._pool = pool
        self._tree = tree
        self._swap = swap
        self._paging = paging
        self._max_num_seqs = max_num_seqs
        self._budget = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._max_steps = max_steps
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._stalled = False  # who waits was refused, and nothing has changed since
        self.preemptions = 0
        self.swaps = 0

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return sum(1 + len(sequence.forks) for sequence in self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks, or will once their prompt is complete."""
        return sum(1 + len(sequence.forks) for sequence in self._running)

    @property
    def blocks_used(self) -> int:
        """Blocks that running sequences hold."""
        return self._pool.num_used

    def has_work(self) -> bool:
        """Whether a plan would not be empty."""
        return bool(self._running or self._waiting)

    def add(self, request: Request) -> None:
        """Queue a request. The caller has checked that it can ever fit."""
        room, limit = self._max_model_len - len(request.prompt), request.sampling.max_tokens
        request.limit = room if limit is None else min(limit, room)
        self._waiting.append(request.sequences[0])
        self._stalled = False

    def abort(self, request: Request, index: int | None = None) -> list[TokenEvent]:
        """End a request, or one of its choices, between two steps; everything it holds is free afterwards."""
        doomed = [s for s in request.sequences if s.finish_reason is None and index in (None, s.index)]
        return [self._end(sequence, "abort") for sequence in doomed]

    def plan(self) -> Plan:
        """The next step: decodes first, then prompts in order of arrival, then whoever waits and fits."""
        draft = Draft()
        preempted, self._stalled = self.preemptions, False
        for sequence in sorted(self._running, key=lambda s: s.remaining > 1):
            if preempted == self.preemptions or sequence in self._running:
                self._continue(sequence, draft)
        if preempted == self.preemptions or not draft.rows:
            self._admit(draft)
        return draft.plan(self._steps(draft.rows.values()))

    def ahead(self, plan: Plan) -> Plan | None:
        """The step after `plan`, whose tokens are not known yet: one more token for each of its sequences that goes on.

        None where these tokens could matter to it: a sequence's next distribution, its prompt or its place depends on
        them, somebody who waits might be admitted, or blocks run out.
        """
        if self._waiting and not self._stalled:
            return None
        # Who has ended since it was planned has a token too many on its way, and no other after that.
        alive = [row for row in plan.rows if row.sequence.finish_reason is None]
        if len(alive) != len(self._running):
            return None
        if not all(len(row.samplers) == 1 and row.sequence.foreseeable for row in alive):
            return None
        going_on = [row for row in alive if not self._ends_with_next(row.sequence)]
        if not going_on or not all(self._reserve_place(row.sequence, row.stop) for row in going_on):
            return None
        return Plan(tuple(Row(row.sequence, row.stop, row.stop + 1, row.samplers) for row in going_on))

    def commit(self, plan: Plan, sampled: Iterable[Sampled]) -> list[tuple[Request, TokenEvent]]:
        """Take a step's results: advance, remember full blocks, share prompts with forks, append tokens, finish.

        What was computed of sequences that have ended since it was planned is dropped.
        """
        now = time.monotonic()
        for sequence, _, stop, samplers in plan.rows:
            if sequence.finish_reason is not None:
                continue
            sequence.computed = stop
            if self._paging.full_blocks(stop) > sequence.cached_blocks:
                self._remember_full_blocks(sequence)
            if len(samplers) > 1:
                self._fork(sequence)
        alive = [item for item in sampled if item.sequence.finish_reason is None]
        return [(item.sequence.request, self._append(item, now)) for item in alive]

    def _ends_with_next(self, sequence: Sequence) -> bool:
        """Whether a sequence's next token is its last one, whichever it is."""
        return len(sequence.output) + 1 >= sequence.request.limit

    def _steps(self, rows: Collection[Row]) -> int:
        """How many decode steps may follow each other, unless somebody stops or arrives: 1 where not all rows decode.

        A first token does not wait for those after it.
        """
        if self._max_steps == 1 or (self._waiting and not self._stalled):
            return 1
        for sequence, start, stop, samplers in rows:
            alone = stop - start == 1 and samplers == (sequence,) and sequence.output
            if not alone or not sequence.wants_a_token_alone:
                return 1
        most = min((row.sequence.request.limit - len(row.sequence.output) for row in rows), default=1)
        steps = 1
        while steps < min(most, self._max_steps) and all(
            self._reserve_place(row.sequence, row.start + steps) for row in rows
        ):
            steps += 1
        return steps

    def _reserve_place(self, sequence: Sequence, position: int) -> bool:
        """A place for a token that follows those with one, if there is one without taking from others or copying."""
        if self._paging.block_of(position) < len(sequence.blocks):
            return self._has_place(sequence, position)
        taken = self._take(1)
        sequence.blocks.extend(taken or ())
        return taken is not None

    def _has_place(self, sequence: Sequence, position: int) -> bool:
        """Whether a sequence has a block for a token that nobody else would see written."""
        index = self._paging.block_of(position)
        return index < len(sequence.blocks) and self._pool.references(sequence.blocks[index]) == 1

    def _continue(self, sequence: Sequence, draft: Draft) -> None:
        """Plan more of a running sequence; where blocks run out, the latest arrivals make room.

        None of them is in the draft yet: only decodes need new blocks, and these come first, in order of arrival.
        """
        count = min(sequence.remaining, self._budget - draft.num_tokens)
        if count == 1 and self._has_place(sequence, sequence.computed):
            draft.compute(sequence, 1)
            return
        while count and not self._reserve(sequence, sequence.computed + count, draft):
            victim = self._running[-1]
            # Alone and still no room: the blocks it shares with the tree are in its own way.
            sequence.may_reuse &= len(self._running) > 1
            self._preempt(victim, draft)
            if victim is sequence:
                return
        if count:
            draft.compute(sequence, count)

    def _admit(self, draft: Draft) -> None:
        while self._waiting and draft.num_tokens < self._budget:
            sequence = self._waiting[0]
            if self.num_running + 1 + len(sequence.forks) > self._max_num_seqs:
                self._stalled = True
                return
            if not self._place(sequence, draft):
                if self._running:
                    self._stalled = True
                    return
                sequence.may_reuse = False
                continue
            self._waiting.popleft()
            self._running.append(sequence)
            self._note_first_time(sequence)
            draft.compute(sequence, min(sequence.remaining, self._budget - draft.num_tokens))

    def _place(self, sequence: Sequence, draft: Draft) -> bool:
        """Blocks for all of a sequence that waits, with what is known or swapped of it; none if there are not enough.

        For all of it, though only a chunk may be computed now: half a prompt would only hold others up.
        """
        if not sequence.swapped:
            self._reuse_prefix(sequence)
        if not self._reserve(sequence, sequence.total, draft, spare=int(_SPARE * len(self._running))):
            self._release(sequence)
            return False
        draft.swaps_in += zip(sequence.swapped, sequence.blocks, strict=False)
        self._leave_swap(sequence)
        return True

    def _note_first_time(self, sequence: Sequence) -> None:
        """What the cache saved is what a request found at its start, not its own work found again after preemption."""
        request = sequence.request
        if request.scheduled is None:
            request.scheduled, request.cached_tokens = time.monotonic(), sequence.computed

    def _reuse_prefix(self, sequence: Sequence) -> None:
        """Take what the tree knows of the sequence's tokens; the last token is always computed, for its logits."""
        if self._tree is None or not sequence.may_reuse:
            return
        match = self._tree.match(sequence.tokens(0, sequence.total - 1), sequence.request.salt)
        for block in match.blocks:
            self._pool.share(block)
        sequence.blocks = array("q", match.blocks)
        sequence.computed = match.length
        sequence.cached_blocks = self._paging.full_blocks(match.length)

    def _reserve(self, sequence: Sequence, upto: int, draft: Draft, spare: int = 0) -> bool:
        """Blocks for the tokens [computed, upto), all or none, while so many are spare.

        A shared block is copied before it is written.
        """
        partial = self._paging.block_of(sequence.computed)
        shared = partial < len(sequence.blocks) and self._pool.references(sequence.blocks[partial]) > 1
        needed = self._paging.blocks_for(upto) - len(sequence.blocks) + shared
        taken = self._take(needed + spare)
        if taken is None:
            return False
        for _ in range(spare):
            self._pool.release(taken.pop())
        if shared:
            source, target = sequence.blocks[partial], taken.pop()
            draft.copies.append((source, target))
            sequence.blocks[partial] = target
            self._pool.release(source)
        sequence.blocks.extend(taken)
        return True

    def _take(self, count: int) -> list[int] | None:
        """So many free blocks, evicting known prefixes where needed; none if there are not enough."""
        taken: list[int] = []
        while len(taken) < count:
            block = self._pool.take()
            if block is not None:
                taken.append(block)
            elif self._tree is None or not self._tree.evict():
                for unused in taken:
                    self._pool.release(unused)
                return None
        return taken

    def _remember_full_blocks(self, sequence: Sequence) -> None:
        """Let the tree know filled blocks. Where it has one of equal content, the sequence adopts that."""
        full = self._paging.full_blocks(sequence.computed)
        for index, block in enumerate(self._remember(sequence, self._paging.capacity(full)), sequence.cached_blocks):
            if block != sequence.blocks[index]:
                self._pool.share(block)
                self._pool.release(sequence.blocks[index])
                sequence.blocks[index] = block
        sequence.cached_blocks = full

    def _fork(self, leader: Sequence) -> None:
        """The request's other choices start from the leader's blocks; the last one is copied when first written."""
        for fork in leader.forks:
            for block in leader.blocks:
                self._pool.share(block)
            fork.blocks = leader.blocks[:]
            fork.computed, fork.cached_blocks = leader.computed, leader.cached_blocks
            self._running.append(fork)
        leader.forks = ()

    def _append(self, item: Sampled, now: float) -> TokenEvent:
        sequence, token, logprobs = item
        sequence.output.append(token)
        reason = self._finish_reason(sequence, token)
        if reason is not None:
            self._end(sequence, reason)
        return TokenEvent(sequence.index, token, now, logprobs, reason)

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        request, length = sequence.request, len(sequence.output)
        if token in request.stop_ids and length > request.sampling.min_tokens:
            return "stop"
        return "length" if length >= request.limit else None

    def _end(self, sequence: Sequence, reason: FinishReason) -> TokenEvent:
        sequence.finish_reason = reason
        self._stalled = False
        if sequence in self._running:
            self._running.remove(sequence)
            self._remember_tail(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._leave_forks(sequence)
        self._leave_swap(sequence)
        self._release(sequence)
        return TokenEvent(sequence.index, None, time.monotonic(), None, reason)

    def _leave_forks(self, sequence: Sequence) -> None:
        """Nobody waits for an ended sequence, nor does it wait: its first live fork takes over the prompt."""
        for leader in sequence.request.sequences:
            leader.forks = tuple(fork for fork in leader.forks if fork is not sequence)
        if sequence.forks:
            heir, *others = sequence.forks
            heir.forks, sequence.forks = tuple(others), ()
            heir.may_reuse = sequence.may_reuse
            self._waiting.appendleft(heir)

    def _remember_tail(self, sequence: Sequence) -> None:
        """An ended text is known to its last computed token, so that a next turn goes on from there."""
        if sequence.computed:
            self._remember(sequence, sequence.computed)

    def _remember(self, sequence: Sequence, upto: int) -> list[int]:
        """Let the tree know the first `upto` tokens: its blocks for those that it did not know of this sequence."""
        if self._tree is None:
            return []
        known, used = sequence.cached_blocks, self._paging.blocks_for(upto)
        tokens = sequence.tokens(self._paging.capacity(known), upto)
        blocks = sequence.blocks
        return self._tree.insert(tokens, blocks[known:used], sequence.request.salt, known=blocks[:known])

    def _preempt(self, sequence: Sequence, draft: Draft) -> None:
        """Give all blocks back; the sequence is first in the queue, with its output as it is.

        What it has computed is swapped out, and where that does not fit, computed again.
        """
        assert sequence not in draft.rows, "its blocks may have copies to come"
        assert not draft.swaps_in, "what they read may be overwritten"
        self._running.remove(sequence)
        self._swap_out(sequence, draft)
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _swap_out(self, sequence: Sequence, draft: Draft) -> None:
        """Keep all blocks that the sequence has computed tokens in, or none."""
        used = sequence.blocks[: self._paging.blocks_for(sequence.computed)]
        if len(used) > self._swap.num_free:
            return
        for block in used:
            target = self._swap.take()
            assert target is not None, "counted above"
            sequence.swapped.append(target)
            draft.swaps_out.append((block, target))
        self.swaps += 1

    def _leave_swap(self, sequence: Sequence) -> None:
        for block in sequence.swapped:
            self._swap.release(block)
        sequence.swapped = []

    def _release(self, sequence: Sequence) -> None:
        """Give all blocks back; what the swap space does not keep is to be computed again."""
        for block in sequence.blocks:
            self._pool.release(block)
        sequence.blocks = array("q")
        sequence.cached_blocks = 0
        if not sequence.swapped:
            sequence.computed = 0
