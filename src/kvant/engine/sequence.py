"""A request and its sequences, and the plan of one step over them."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvant.config import SamplingParams
from kvant.engine.outputs import FinishReason, TokenLogprobs
from kvant.engine.randomness import Randomness
from kvant.errors import KvantError


@dataclass(frozen=True)
class TokenEvent:
    """One sampled token of one choice, or the end of a choice without one (token_id None)."""

    index: int
    token_id: int | None
    time: float
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Failure:
    """Nothing more will come, for this reason: the engine died, or cannot go on with this request."""

    error: KvantError

    @property
    def message(self) -> str:
        """The reason in words."""
        return str(self.error)


Sink = Callable[["Request", TokenEvent | Failure], None]


@dataclass(eq=False)
class Request:
    """One prompt, `sampling.n` sequences.

    Attributes:
        prompt: token ids.
        sampling: how to sample.
        seed: randomness of all its samples, drawn by the engine where `sampling` brings none.
        sink: receives each event, on the engine's thread; it must return at once.
        stop_ids: end a sequence: the model's end-of-sequence ids (unless ignored) and the request's own.
        salt: set where KV depends on more than the token prefix; see `PrefixTree`.
        cached_tokens: prompt tokens found in the prefix cache.
        prompt_logprobs: filled as the prompt is computed; the first token has none.
        limit: tokens of each choice's output at most; the scheduler knows.
        scheduled: when the request first left the queue (time.monotonic seconds).
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    sink: Sink
    stop_ids: frozenset[int] = frozenset()
    salt: Hashable = None
    arrival: float = field(default_factory=time.monotonic)
    limit: int = 0
    scheduled: float | None = None
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    sequences: tuple[Sequence, ...] = ()

    def __post_init__(self) -> None:
        self.sequences = tuple(Sequence(self, index) for index in range(self.sampling.n))
        leader = self.sequences[0]
        leader.forks = self.sequences[1:]


@dataclass(eq=False)
class Sequence:
    """One choice of a request: `computed` of its `total` tokens have their KV in `blocks`.

    Attributes:
        blocks: ids as machine integers, so that a step's table is put together at the speed of memory.
        randomness: of its samples.
        forks: the request's other choices, as long as they wait to share this one's prompt.
        cached_blocks: leading blocks that the prefix tree knows.
        may_reuse: whether it may take blocks from the prefix tree.
        swapped: blocks of the swap space that keep its KV while it waits for room in the pool; else empty.
    """

    request: Request
    index: int
    output: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: array[int] = field(default_factory=lambda: array("q"))
    forks: tuple[Sequence, ...] = ()
    cached_blocks: int = 0
    may_reuse: bool = True
    swapped: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    randomness: Randomness = field(init=False)

    def __post_init__(self) -> None:
        self.randomness = Randomness(self.request.seed, self.index)

    @property
    def total(self) -> int:
        """Prompt and output tokens."""
        return len(self.request.prompt) + len(self.output)

    @property
    def remaining(self) -> int:
        """Tokens whose KV is still to be computed; 1 while decoding."""
        return self.total - self.computed

    @property
    def foreseeable(self) -> bool:
        """Whether its next token but one can be drawn by a device that alone knows the next one."""
        sampling = self.request.sampling
        return not sampling.penalizes and len(self.output) >= sampling.min_tokens

    @property
    def reshapes(self) -> bool:
        """Whether it asks for another distribution of its next token than the model's."""
        sampling = self.request.sampling
        return sampling.penalizes or bool(sampling.logit_bias) or len(self.output) < sampling.min_tokens

    @property
    def wants_a_token_alone(self) -> bool:
        """Whether it takes the model's distribution as it is, and wants to know no more of it than a token."""
        sampling = self.request.sampling
        return sampling.logprobs is None and sampling.prompt_logprobs is None and not self.reshapes

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of positions [start, stop)."""
        prompt = self.request.prompt
        if start >= len(prompt):
            return self.output[start - len(prompt) : stop - len(prompt)]
        return [*prompt[start:stop], *self.output[max(start - len(prompt), 0) : max(stop - len(prompt), 0)]]


# Rows and tokens are tuples: a frozen dataclass takes three times as long to make, and there are many.


class Row(NamedTuple):
    """One sequence's share of a step: compute the tokens [start, stop), then sample for `samplers`.

    `samplers` is empty while a prompt is incomplete, the sequence itself when decoding, and all of the request's
    sequences when their common prompt is complete.
    """

    sequence: Sequence
    start: int
    stop: int
    samplers: tuple[Sequence, ...]

    @property
    def tells_of_its_prompt(self) -> bool:
        """Whether somebody wants to know how likely the prompt's tokens are that follow this row's."""
        request = self.sequence.request
        return request.sampling.prompt_logprobs is not None and self.start < len(request.prompt) - 1

    def moved(self, steps: int) -> Row:
        """As much, so many tokens further on."""
        return Row(self.sequence, self.start + steps, self.stop + steps, self.samplers)


@dataclass(frozen=True)
class Plan:
    """A step in plain integers.

    Blocks are copied, (source, target), before anything is computed: first `swaps_out` from the pool to the swap space,
    then `copies` within the pool, one after the other, last `swaps_in`. The order matters: the source of one may be
    given away in the same plan, and be the target of a later one.

    More than one of `steps` is a burst: each row has one token, and goes on with what it draws, at most so often.
    """

    rows: tuple[Row, ...]
    copies: tuple[tuple[int, int], ...] = ()
    swaps_out: tuple[tuple[int, int], ...] = ()
    swaps_in: tuple[tuple[int, int], ...] = ()
    steps: int = 1

    def after(self, steps: int) -> Plan:
        """What its rows compute in a burst's step that so many go before."""
        return Plan(tuple([row.moved(steps) for row in self.rows])) if steps else self

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(row.stop - row.start for row in self.rows)


@dataclass
class Draft:
    """A plan in the making; it computes `num_tokens` so far."""

    rows: dict[Sequence, Row] = field(default_factory=dict)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swaps_out: list[tuple[int, int]] = field(default_factory=list)
    swaps_in: list[tuple[int, int]] = field(default_factory=list)
    num_tokens: int = 0

    def compute(self, sequence: Sequence, count: int) -> None:
        """Let the step compute the sequence's next `count` tokens."""
        stop = sequence.computed + count
        samplers = (sequence, *sequence.forks) if stop == sequence.total else ()
        self.rows[sequence] = Row(sequence, sequence.computed, stop, samplers)
        self.num_tokens += count

    def plan(self, steps: int) -> Plan:
        """The plan as it stands, of so many steps at most."""
        return Plan(tuple(self.rows.values()), tuple(self.copies), tuple(self.swaps_out), tuple(self.swaps_in), steps)


class Sampled(NamedTuple):
    """A token drawn for a sequence."""

    sequence: Sequence
    token_id: int
    logprobs: TokenLogprobs | None = None
