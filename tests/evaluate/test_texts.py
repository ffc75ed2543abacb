"""The text that models are evaluated on."""

from __future__ import annotations

import pytest

from kvant.errors import ConfigError
from kvant.evaluate.texts import check_windows, read_text
from kvant.quantize.texts import calibration_text, cut_windows
from kvant.weights.load import open_source
from kvant.weights.tokenizer import read_tokenizer


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


def test_nothing_is_evaluated_on_what_it_was_calibrated_on():
    """No line of ten words of one text is in the other."""
    words, seen = read_text(None).split(), calibration_text().split()
    known = {tuple(seen[start : start + 10]) for start in range(len(seen) - 9)}
    shared = sum(tuple(words[start : start + 10]) in known for start in range(len(words) - 9))
    assert shared < len(words) / 1000
