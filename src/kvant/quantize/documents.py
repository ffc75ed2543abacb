"""Files that a model is calibrated on: plain text, JSON lines of texts, JSON lines of chats."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvant.errors import ConfigError, RequestError
from kvant.quantize.texts import read_text_file
from kvant.text.chat import render_chat
from kvant.text.tokenizer import Tokenizer

# Where a line has its text, and where its chat.
_TEXT_KEYS = ("text", "content", "prompt", "question", "instruction")
_CHAT_KEYS = ("messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def read_documents(path: Path, tokenizer: Tokenizer) -> str:
    """A file's text. A .jsonl or .json file holds documents: strings, texts under a usual key, or chats.

    Chats are written as the model's template writes them. Documents follow each other after an empty line.

    Raises:
        ConfigError: the file cannot be read, or a line of it holds neither a text nor a chat that the template takes.
    """
    content = read_text_file(path)
    if path.suffix not in (".jsonl", ".json"):
        return content
    return "\n\n".join(_document(item, where, tokenizer) for where, item in _items(content, path))


def _items(content: str, path: Path) -> Iterator[tuple[str, Any]]:
    """Each document and its place: lines, or the elements of one array."""
    if path.suffix == ".json":
        found = _parsed(content, str(path))
        if not isinstance(found, list):
            raise ConfigError(f"{path} must hold a list of texts or chats; one a line is .jsonl")
        yield from ((f"{path}, element {i}", item) for i, item in enumerate(found))
        return
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield f"{path}, line {number}", _parsed(line, f"{path}, line {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: this is not JSON: {error}") from error


def _document(item: Any, where: str, tokenizer: Tokenizer) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        for key in _CHAT_KEYS:
            if isinstance(item.get(key), list):
                return _chat(item[key], where, tokenizer)
        for key in _TEXT_KEYS:
            if isinstance(item.get(key), str):
                return str(item[key])
    known = ", ".join((*_TEXT_KEYS, *_CHAT_KEYS))
    raise ConfigError(f"{where}: there is no text and no chat; kvant looks for {known}")


def _chat(turns: list[Any], where: str, tokenizer: Tokenizer) -> str:
    try:
        return render_chat(tokenizer, [_message(turn) for turn in turns], add_generation_prompt=False)
    except RequestError as error:
        raise ConfigError(f"{where}: {error}") from error


def _message(turn: Any) -> dict[str, Any]:
    """A turn as OpenAI writes it; ShareGPT's "from" and "value" are "role" and "content"."""
    if not isinstance(turn, Mapping):
        return {}
    role, content = turn.get("role", turn.get("from", "")), turn.get("content", turn.get("value", ""))
    return {"role": _ROLES.get(role, role), "content": content}
