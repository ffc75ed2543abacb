"""From token events to text: stop strings wherever they fall, several choices, and numbers that add up."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvant.config import SamplingParams
from kvant.engine.deltas import DeltaBuilder
from kvant.engine.outputs import Delta, FinishReason, Response, TokenLogprobs, Usage
from kvant.engine.sequence import Request, TokenEvent
from kvant.text.directory import load_tokenizer
from kvant.text.tokenizer import Tokenizer
from tests.engine.checkpoint import END


@pytest.fixture(scope="session")
def tokenizer(tiny_path) -> Tokenizer:
    return load_tokenizer(tiny_path)


@dataclass
class Telling:
    """A request whose events are told by hand, at one second each."""

    tokenizer: Tokenizer
    sampling: SamplingParams
    clock: float = 100.0
    deltas: list[Delta] = field(default_factory=list)
    early: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.request = Request((5, 6, 7), self.sampling, 0, lambda *event: None, arrival=100.0, scheduled=100.5)
        self.builder = DeltaBuilder(self.request, self.tokenizer, continues=True)

    def say(self, said: str | bytes | int | None, end: FinishReason | None = None, index: int = 0) -> Delta | None:
        """One event: a character or a byte that is one token, a token id, or an end without a token."""
        if isinstance(said, (str, bytes)):
            [said] = self.ids(said)
        self.clock += 1
        logprobs = None
        if self.sampling.logprobs is not None and said is not None:
            logprobs = TokenLogprobs(said, -float(said), 1, ())
        event = TokenEvent(index, said, self.clock, logprobs, end)
        delta = self.builder.push(event)
        if self.builder.stopped_early(event) and index not in self.early:
            self.early.append(index)
        if delta is not None:
            self.deltas.append(delta)
        return delta

    def say_all(self, text: str, end: FinishReason | None = "length", index: int = 0) -> None:
        ids = self.ids(text)
        for place, token in enumerate(ids):
            self.say(token, end if place == len(ids) - 1 else None, index)

    def ids(self, said: str | bytes) -> list[int]:
        data = said.encode() if isinstance(said, str) else said
        table = {self.tokenizer.token_bytes(i): i for i in range(256)}
        return [table[bytes([byte])] for byte in data]

    def response(self) -> Response:
        assert self.builder.finished
        return self.builder.response()


def told(telling: Telling, index: int = 0) -> tuple[str, tuple[int, ...]]:
    """Text and tokens of a choice, put together from its deltas."""
    mine = [delta for delta in telling.deltas if delta.index == index]
    return "".join(delta.text for delta in mine), tuple(token for delta in mine for token in delta.token_ids)


WORDS = st.text(st.sampled_from("abcé "), max_size=12)


@given(text=WORDS.filter(bool), stops=st.lists(WORDS.filter(bool), max_size=3), logprobs=st.sampled_from((None, 0)))
def test_text_ends_before_the_stop_string_that_is_complete_first(tokenizer, text, stops, logprobs):
    telling = Telling(tokenizer, SamplingParams(stop=stops, logprobs=logprobs))
    telling.say_all(text)
    ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    expected, reason = text, "length"
    if ends:
        end, length = min(ends)
        expected, reason = text[: end + length], "stop"
    response = telling.response()
    assert (response.text, response.finish_reason) == (expected, reason)
    assert told(telling) == (response.text, response.token_ids)
    assert tokenizer.decode(response.token_ids).startswith(expected)
    assert len(response.token_ids) == len(expected.encode()) if ends else response.token_ids == tuple(telling.ids(text))
    assert response.usage == Usage(3, len(response.token_ids))
    assert [delta.finish_reason for delta in telling.deltas] == [None] * (len(telling.deltas) - 1) + [reason]
    assert [delta.usage for delta in telling.deltas] == [None] * (len(telling.deltas) - 1) + [response.usage]
    if logprobs is not None:
        assert [one.token_id for one in response.logprobs] == list(response.token_ids)
        assert tuple(one for delta in telling.deltas for one in delta.logprobs or ()) == response.logprobs
    else:
        assert response.logprobs is None


def test_what_may_become_a_stop_string_is_held_back(tokenizer):
    telling = Telling(tokenizer, SamplingParams(stop="END"))
    assert telling.say("a") == Delta(0, "a", tuple(telling.ids("a")))
    assert telling.say("E") is None
    assert telling.say("N") is None
    assert telling.say("E").text == "EN"
    assert telling.say("N") is None
    assert telling.early == []
    last = telling.say("D")
    assert (last.text, last.finish_reason, last.token_ids) == ("", "stop", ())
    assert telling.early == [0], "the engine has to be told to stop"
    assert telling.say("x") is None
    assert telling.say(None, "abort") is None
    assert telling.response().text == "aEN"


def test_half_a_stop_string_at_the_end_is_text(tokenizer):
    telling = Telling(tokenizer, SamplingParams(stop="END"))
    telling.say_all("xEN")
    assert telling.response().text == "xEN"
    assert telling.response().finish_reason == "length"
    assert telling.early == []


def test_characters_wait_until_they_are_whole(tokenizer):
    telling = Telling(tokenizer, SamplingParams())
    first, second = "é".encode()
    assert telling.say(bytes([first])) is None
    assert telling.say(bytes([second])).text == "é"
    assert telling.say(bytes([first]), "length").text == "�"
    assert len(telling.response().token_ids) == 3


def test_an_end_token_is_told_but_has_no_text(tokenizer):
    telling = Telling(tokenizer, SamplingParams())
    telling.say("a")
    last = telling.say(END, "stop")
    assert (last.text, last.token_ids, last.finish_reason) == ("", (END,), "stop")
    assert (telling.response().text, telling.response().usage.completion_tokens) == ("a", 2)


def test_choices_are_told_apart_and_the_last_brings_the_sums(tokenizer):
    telling = Telling(tokenizer, SamplingParams(n=3, stop="!"))
    telling.request.cached_tokens = 2
    telling.say("a", index=1)
    telling.say("b", index=0)
    telling.say("c", "length", index=0)
    assert not telling.builder.finished
    telling.say("!", index=1)
    assert telling.early == [1]
    telling.say(None, "abort", index=2)
    response = telling.response()
    assert [(choice.text, choice.finish_reason) for choice in response.choices] == [
        ("bc", "length"), ("a", "stop"), ("", "abort"),
    ]  # fmt: skip
    assert [told(telling, index)[0] for index in range(3)] == ["bc", "a", ""]
    assert response.usage == telling.deltas[-1].usage == Usage(3, 3, 2)
    assert response.usage.total_tokens == 6
    assert all(delta.usage is None for delta in telling.deltas[:-1])


def test_prompt_logprobs_come_with_the_first_delta_only(tokenizer):
    telling = Telling(tokenizer, SamplingParams(n=2, prompt_logprobs=0))
    scores = (None, TokenLogprobs(6, -1.0, 1, ()), TokenLogprobs(7, -2.0, 2, ()))
    telling.request.prompt_logprobs = list(scores)
    telling.say("a", "length", index=1)
    telling.say("b", "length", index=0)
    assert [delta.prompt_logprobs for delta in telling.deltas] == [scores, None]
    assert telling.response().prompt_logprobs == scores


def test_logprobs_of_held_back_tokens_come_with_them(tokenizer):
    telling = Telling(tokenizer, SamplingParams(stop="ab", logprobs=0))
    assert telling.say("a") is None
    delta = telling.say("c")
    assert (delta.text, [one.token_id for one in delta.logprobs]) == ("ac", telling.ids("ac"))


def test_times(tokenizer):
    telling = Telling(tokenizer, SamplingParams())
    telling.say_all("abcde")
    timings = telling.response().timings
    assert (timings.queue, timings.time_to_first_token, timings.total) == (0.5, 1.0, 5.0)
    assert timings.tokens_per_second == 1.0
    assert telling.deltas[-1].timings == timings


def test_times_of_what_never_began(tokenizer):
    telling = Telling(tokenizer, SamplingParams())
    telling.request.scheduled = None
    telling.say(None, "abort")
    timings = telling.response().timings
    assert (timings.queue, timings.time_to_first_token, timings.total) == (1.0, 1.0, 1.0)
    assert timings.tokens_per_second == 0
    assert telling.response().token_ids == ()
