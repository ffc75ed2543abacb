"""Texts and the windows they are cut into."""

from __future__ import annotations

import pytest

from kvant.errors import ConfigError
from kvant.evaluate.texts import check_windows, cut_windows, read_text
from kvant.text.directory import load_tokenizer
from kvant.text.tokenizer import Tokenizer, frame
from kvant.weights.load import open_source
from kvant.weights.tokenizer import read_tokenizer


@pytest.fixture
def tokenizer(tiny_path) -> Tokenizer:
    return load_tokenizer(tiny_path)


def test_windows_follow_each_other_from_the_beginning(tokenizer):
    windows = cut_windows("abcdefgh", tokenizer, 2, 3)
    assert [tokenizer.decode(window) for window in windows] == ["abc", "def"]
    assert all(len(window) == 3 for window in windows)


def test_the_last_window_may_end_with_the_text(tokenizer):
    assert tokenizer.decode(cut_windows("abcdef", tokenizer, 2, 3)[1]) == "def"


@pytest.mark.parametrize("eos", [None, 258])
def test_each_window_begins_with_bos_and_none_ends_with_eos(tokenizer, eos):
    frame(tokenizer.backend, 256, eos)
    windows = cut_windows("abcdefgh", tokenizer, 2, 4)
    assert [window[0] for window in windows] == [256, 256]
    assert [tokenizer.decode(window[1:]) for window in windows] == ["abc", "def"]


def test_an_eos_alone_is_not_taken_for_the_beginning(tokenizer):
    frame(tokenizer.backend, None, 256)
    assert tokenizer.decode(cut_windows("abc", tokenizer, 1, 3)[0]) == "abc"


def test_a_short_text_tells_how_many_windows_it_has(tokenizer):
    with pytest.raises(ConfigError, match="has 8 tokens, enough for 2 windows of 3, not for 3"):
        cut_windows("abcdefgh", tokenizer, 3, 3)
    with pytest.raises(ConfigError, match="has 0 tokens, enough for 0 windows"):
        cut_windows("", tokenizer, 1, 3)


def test_a_window_needs_room_beside_bos(tokenizer):
    frame(tokenizer.backend, 256, None)
    with pytest.raises(ConfigError, match="window_size=1 has no room"):
        cut_windows("abc", tokenizer, 1, 1)


@pytest.mark.parametrize(
    ("count", "size", "complaint"),
    [(0, 8, "windows=0"), (1, 1, "window_size=1 must be from 2 to 16"), (1, 17, "window_size=17 must be from 2 to 16")],
)
def test_impossible_windows(count, size, complaint):
    with pytest.raises(ConfigError, match=complaint):
        check_windows(count, size, max_position=16)


def test_possible_windows():
    check_windows(1, 2, max_position=16)
    check_windows(99, 16, max_position=16)


def test_unreadable_files_say_why(tmp_path):
    with pytest.raises(ConfigError, match="absent.txt cannot be read: No such file"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_text(tmp_path)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("ab\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is not UTF-8 \(byte 2\)"):
        read_text(latin)


def test_a_file_is_read_as_it_is(truman):
    assert read_text(truman) == truman.read_text(encoding="utf-8")


def test_the_bundled_text_is_long_enough_for_the_defaults(smollm2):
    windows = cut_windows(read_text(None), read_tokenizer(open_source(smollm2)), 8, 1024)
    assert len({token for window in windows for token in window}) > 1000
