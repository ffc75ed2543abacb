"""Calibration files: text, JSON lines, chats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvant.errors import ConfigError
from kvant.quantize.documents import read_documents
from kvant.text.chat import render_chat
from kvant.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def written(path: Path, items: list) -> Path:
    path.write_text("\n".join(item if isinstance(item, str) else json.dumps(item) for item in items))
    return path


def test_a_text_is_taken_as_it_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = written(tmp_path / "a.txt", ['{"text": "no JSON here"}', "two"])
    assert read_documents(path, tokenizer) == '{"text": "no JSON here"}\ntwo'


def test_lines_are_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [{"text": "one"}, '"two"', "", {"id": 3, "content": "three\u2028"}, {"prompt": "four", "answer": "5"}]
    assert read_documents(written(tmp_path / "a.jsonl", lines), tokenizer) == "one\n\ntwo\n\nthree\u2028\n\nfour"


def test_chats_are_written_as_the_model_knows_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    path = written(tmp_path / "a.jsonl", [{"messages": CHAT}, {"conversations": turns}])
    chat = render_chat(tokenizer, CHAT, add_generation_prompt=False)
    assert "<|im_start|>assistant\nHello" in chat
    assert read_documents(path, tokenizer) == f"{chat}\n\n{chat}"


def test_a_list_in_one_file_is_taken_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.json").write_text(json.dumps(["one", {"text": "two"}], indent=1))
    assert read_documents(tmp_path / "a.json", tokenizer) == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"text": ', "line 2: this is not JSON"),
        ("a.jsonl", '{"title": "no text"}', "line 1: there is no text and no chat"),
        ("a.jsonl", "[1]", "line 1: there is no text"),
        ("a.jsonl", '{"conversations": [{"from": "alien", "value": "Hi"}]}', "line 1: .*alien"),
        ("a.jsonl", '{"messages": ["hi"]}', "line 1: "),
        ("a.json", '{"text": "one"}', "must hold a list"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(name, content, message, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_documents(tmp_path / name, tokenizer)
