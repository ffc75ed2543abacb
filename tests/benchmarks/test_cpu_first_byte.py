"""The benchmark of the first byte: what it waits for, and what it says when nothing comes."""

from __future__ import annotations

import json
import sys

import first_byte
import pytest


def test_the_first_byte_is_waited_for_and_not_the_end():
    code = "import sys, time; time.sleep(0.2); print('a', flush=True); time.sleep(1)"
    assert 0.2 <= first_byte.first_byte([sys.executable, "-c", code]) < 1.2


@pytest.mark.parametrize("code", ["pass", "print('a'); raise SystemExit('it broke')"])
def test_no_answer_ends_it(code):
    with pytest.raises(SystemExit, match="gave no answer"):
        first_byte.first_byte([sys.executable, "-c", code])


def test_times_are_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(first_byte, "_COMMAND", (sys.executable, "-c", "print('hello')"))
    out = tmp_path / "times.json"
    monkeypatch.setattr(sys, "argv", ["first_byte.py", "models/m.gguf", "--runs", "3", "--out", str(out)])
    first_byte.main()
    written = json.loads(out.read_text())
    assert (written["model"], len(written["seconds"])) == ("m.gguf", 3)
    assert "median" in capsys.readouterr().out
