"""Texts and the windows they are cut into."""

from __future__ import annotations

import pytest

from kvant.errors import ConfigError
from kvant.quantize.texts import cut_windows, read_text_file
from kvant.text.directory import load_tokenizer
from kvant.text.tokenizer import Tokenizer, frame


@pytest.fixture
def own(tiny_path) -> Tokenizer:
    """A tokenizer to be changed."""
    return load_tokenizer(tiny_path)


def test_windows_follow_each_other_from_the_beginning(tokenizer):
    windows = cut_windows("abcdefgh", tokenizer, 2, 3)
    assert [tokenizer.decode(window) for window in windows] == ["abc", "def"]
    assert all(len(window) == 3 for window in windows)


def test_the_last_window_may_end_with_the_text(tokenizer):
    assert tokenizer.decode(cut_windows("abcdef", tokenizer, 2, 3)[1]) == "def"


@pytest.mark.parametrize("eos", [None, 258])
def test_each_window_begins_with_bos_and_none_ends_with_eos(own, eos):
    frame(own.backend, 256, eos)
    windows = cut_windows("abcdefgh", own, 2, 4)
    assert [window[0] for window in windows] == [256, 256]
    assert [own.decode(window[1:]) for window in windows] == ["abc", "def"]


def test_an_eos_alone_is_not_taken_for_the_beginning(own):
    frame(own.backend, None, 256)
    assert own.decode(cut_windows("abc", own, 1, 3)[0]) == "abc"


def test_a_short_text_tells_how_many_windows_it_has_and_what_to_do(own):
    with pytest.raises(ConfigError, match="has 8 tokens, enough for 2 windows of 3, not for 3; ask for fewer"):
        cut_windows("abcdefgh", own, 3, 3)
    with pytest.raises(ConfigError, match="has 0 tokens, enough for 0 windows"):
        cut_windows("", own, 1, 3)
    frame(own.backend, 256, None)
    with pytest.raises(ConfigError, match="has 5 tokens, enough for 2 windows of 3, not for 3"):
        cut_windows("abcde", own, 3, 3)


def test_a_window_needs_room_beside_bos(own):
    frame(own.backend, 256, None)
    with pytest.raises(ConfigError, match="window_size=1 has no room"):
        cut_windows("abc", own, 1, 1)


def test_a_file_is_read_as_utf_8(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("é\nあ".encode())
    assert read_text_file(path) == "é\nあ"


def test_unreadable_files_say_why(tmp_path):
    with pytest.raises(ConfigError, match="absent.txt cannot be read: No such file"):
        read_text_file(tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_text_file(tmp_path)
    (tmp_path / "latin.txt").write_bytes("ab\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.txt is not UTF-8 \(byte 2\); convert it"):
        read_text_file(tmp_path / "latin.txt")
