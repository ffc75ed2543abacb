"""From a request's token events to its deltas: text, stop strings, usage, timings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kvant.engine.outputs import Choice, Delta, FinishReason, Response, Timings, TokenLogprobs, Usage
from kvant.engine.sequence import Request, TokenEvent
from kvant.text.stream import TextStream
from kvant.text.tokenizer import Tokenizer


@dataclass
class _ChoiceState:
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reported: int = 0
    finish_reason: FinishReason | None = None


class DeltaBuilder:
    """The consumer's side of one request; it runs on the consumer's thread.

    Args:
        request: as the engine took it.
        tokenizer: of the model.
        continues: the text goes on from the prompt's, so that a leading space belongs to it.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, continues: bool) -> None:
        self._request = request
        stop = request.sampling.stop_strings
        streams = (TextStream(tokenizer, stop, continues=continues) for _ in request.sequences)
        self._choices = [_ChoiceState(stream) for stream in streams]
        self._first_token: float | None = None
        self._last_token = request.arrival
        self._prompt_reported = request.sampling.prompt_logprobs is None

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason is not None for choice in self._choices)

    def push(self, event: TokenEvent) -> Delta | None:
        """What the event adds, if anything can be told yet. Events after a choice's end add nothing."""
        choice = self._choices[event.index]
        if choice.finish_reason is not None:
            return None
        self._note_time(event)
        text = self._take(choice, event)
        choice.finish_reason = event.finish_reason
        if event.finish_reason is not None:
            text += choice.stream.flush()
        if choice.stream.stopped is not None:
            self._cut(choice)
        return self._delta(event.index, choice, text)

    def stopped_early(self, event: TokenEvent) -> bool:
        """Whether the choice ended here by a stop string, which the engine does not know of."""
        return event.finish_reason is None and self._choices[event.index].finish_reason is not None

    def response(self) -> Response:
        """Everything, once finished."""
        return Response(
            choices=tuple(self._choice(index) for index in range(len(self._choices))),
            prompt_token_ids=self._request.prompt,
            usage=self._usage(),
            timings=self._timings(),
            prompt_logprobs=self._prompt_logprobs(),
        )

    def _take(self, choice: _ChoiceState, event: TokenEvent) -> str:
        if event.token_id is None:
            return ""
        choice.token_ids.append(event.token_id)
        if event.logprobs is not None:
            choice.logprobs.append(event.logprobs)
        return choice.stream.push([event.token_id])

    def _cut(self, choice: _ChoiceState) -> None:
        """A stop string ended the text: the tokens that lie wholly after it are dropped."""
        choice.finish_reason = "stop"
        keep = max(choice.stream.token_count, choice.reported)
        del choice.token_ids[keep:], choice.logprobs[keep:]

    def _delta(self, index: int, choice: _ChoiceState, text: str) -> Delta | None:
        # Tokens whose text is held back wait with it, so that none is told which a stop string then cuts off.
        upto = len(choice.token_ids) if choice.finish_reason is not None else choice.stream.token_count
        tokens, logprobs = choice.token_ids[choice.reported : upto], choice.logprobs[choice.reported : upto]
        if not text and not tokens and choice.finish_reason is None:
            return None
        choice.reported = max(upto, choice.reported)
        delta = Delta(index, text, tuple(tokens), tuple(logprobs) or None, choice.finish_reason)
        if not self._prompt_reported:
            self._prompt_reported = True
            delta = replace(delta, prompt_logprobs=self._prompt_logprobs())
        return replace(delta, usage=self._usage(), timings=self._timings()) if self.finished else delta

    def _choice(self, index: int) -> Choice:
        choice = self._choices[index]
        logprobs = None if self._request.sampling.logprobs is None else tuple(choice.logprobs)
        return Choice(index, choice.stream.text, tuple(choice.token_ids), choice.finish_reason or "abort", logprobs)

    def _usage(self) -> Usage:
        completion = sum(len(choice.token_ids) for choice in self._choices)
        return Usage(len(self._request.prompt), completion, self._request.cached_tokens)

    def _note_time(self, event: TokenEvent) -> None:
        self._last_token = event.time
        if self._first_token is None and event.token_id is not None:
            self._first_token = event.time

    def _timings(self) -> Timings:
        arrival = self._request.arrival
        first = self._first_token or self._last_token
        decoded = sum(len(choice.token_ids) for choice in self._choices) - len(self._choices)
        seconds = self._last_token - first
        return Timings(
            queue=(self._request.scheduled or self._last_token) - arrival,
            time_to_first_token=first - arrival,
            total=self._last_token - arrival,
            tokens_per_second=decoded / seconds if decoded > 0 and seconds > 0 else 0.0,
        )

    def _prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        return None if self._request.sampling.prompt_logprobs is None else tuple(self._request.prompt_logprobs)
