"""Text that comes in pieces is the text that comes at once."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.text.gguf import tokenizer_from_gguf
from kvant.text.stream import TextStream


def pushed(stream, ids, sizes):
    """Push the ids in groups of these sizes (then the rest), and collect the pieces."""
    pieces, start = [], 0
    for size in [*sizes, len(ids)]:
        pieces.append(stream.push(ids[start : start + size]))
        start += size
    return [*pieces, stream.flush()]


SIZES = st.lists(st.integers(0, 5), max_size=20)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=60), sizes=SIZES, skip=st.booleans())
def test_all_pieces_together_are_the_decoded_text(smollm2_tokenizer, ids, sizes, skip):
    stream = TextStream(smollm2_tokenizer, skip_special_tokens=skip)
    pieces = pushed(stream, ids, sizes)
    assert "".join(pieces) == smollm2_tokenizer.decode(ids, skip) == smollm2_tokenizer.backend.decode(ids, skip)
    assert stream.text == "".join(pieces)
    assert stream.stopped is None


@pytest.fixture(scope="module")
def llama(train_sentencepiece, sentencepiece_keys):
    return tokenizer_from_gguf(sentencepiece_keys(train_sentencepiece()))


@settings(deadline=None)
@given(data=st.data(), sizes=SIZES, skip=st.booleans())
def test_with_sentencepiece_too(llama, data, sizes, skip):
    ids = data.draw(st.lists(st.integers(0, llama.vocab_size - 1), max_size=40))
    assert "".join(pushed(TextStream(llama, skip_special_tokens=skip), ids, sizes)) == llama.decode(ids, skip)


def test_a_text_that_continues_keeps_its_leading_space(llama):
    ids = llama.encode("the dog", add_special_tokens=False)
    assert "".join(pushed(TextStream(llama), ids, [])) == "the dog"
    assert "".join(pushed(TextStream(llama, continues=True), ids, [])) == " the dog"
    two_spaces = llama.encode(" the dog", add_special_tokens=False)
    assert "".join(pushed(TextStream(llama), two_spaces, [1])) == " the dog"


def test_characters_come_whole(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode("😀好")
    stream = TextStream(smollm2_tokenizer)
    pieces = [stream.push([token]) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == "😀好"
    assert len(ids) > 2


def test_what_never_becomes_whole_comes_at_the_end(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode("a😀")
    stream = TextStream(smollm2_tokenizer)
    assert stream.push(ids[:-1]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.token_count == len(ids) - 1


class Letters:
    """One letter a token: 0 is "a", 1 is "b"; 26 is special."""

    leading_spaces = 0

    def token_bytes(self, token):
        return b"<end>" if token == 26 else bytes([97 + token])

    def is_special(self, token):
        return token == 26


def ids_of(text):
    return [ord(char) - 97 for char in text]


def expected(text, stops):
    """The text before the stop string that is complete first, and that stop string: the longest of several."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


WORDS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=6), max_size=4, unique=True)


@given(text=WORDS, stops=STOPS, sizes=SIZES)
def test_the_stop_string_that_is_complete_first_ends_the_text(text, stops, sizes):
    stream = TextStream(Letters(), tuple(stops))
    pieces = pushed(stream, ids_of(text), sizes)
    assert ("".join(pieces), stream.stopped) == expected(text, stops)
    assert stream.text == "".join(pieces)
    assert stream.token_count == len(stream.text)


@given(text=WORDS, stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text, stops):
    stream = TextStream(Letters(), tuple(stops))
    seen = ""
    for char in text:
        stream.push(ids_of(char))
        seen += char
        if stream.stopped is not None:
            break
        held = seen[len(stream.text) :]
        beginnings = [stop[:n] for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])]
        assert held == max(beginnings, key=len, default="")


@settings(deadline=None)
@given(text=st.text("ab .\n😀", max_size=20), stop=st.text("ab .\n😀", min_size=1, max_size=3), sizes=SIZES)
def test_stop_strings_inside_tokens(smollm2_tokenizer, text, stop, sizes):
    ids = smollm2_tokenizer.encode(text)
    stream = TextStream(smollm2_tokenizer, (stop,))
    pieces = pushed(stream, ids, sizes)
    assert "".join(pieces) == text.split(stop)[0]
    assert (stream.stopped == stop) == (stop in text)
    covering = (n for n in range(len(ids) + 1) if smollm2_tokenizer.decode(ids[:n]).startswith(stream.text))
    assert stream.token_count == next(covering)


def test_nothing_comes_after_a_stop_string():
    stream = TextStream(Letters(), ("b",))
    assert stream.push(ids_of("ab")) == "a"
    assert stream.push(ids_of("c")) == ""
    assert stream.flush() == ""
    assert (stream.text, stream.stopped, stream.token_count) == ("a", "b", 1)


def test_special_tokens_count_where_text_follows_them():
    stream = TextStream(Letters())
    stream.push([0, 26])
    assert stream.token_count == 1
    stream.push([1, 26])
    stream.flush()
    assert (stream.text, stream.token_count) == ("ab", 3)


def test_a_token_costs_the_same_late_in_the_text(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode("the quick brown fox ") * 400
    stream = TextStream(smollm2_tokenizer, ("never there",))

    def seconds(part):
        start = time.perf_counter()
        for token in part:
            stream.push([token])
        return time.perf_counter() - start

    early, late = (min(seconds(ids) for _ in range(3)) for _ in range(2))
    assert late < 3 * early
