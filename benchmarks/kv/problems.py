"""What every task gives: problems with a prompt and a judge; and how they are read and chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kvant.errors import ConfigError

PASSED = "passed"

Messages = list[dict[str, str]]
Row = Mapping[str, Any]
_T = TypeVar("_T")


class Problem(Protocol):
    """One problem of a task."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    @property
    def messages(self) -> Messages:
        """The chat that asks for an answer."""

    def judge(self, answer: str) -> str:
        """`PASSED`, or in a word or two what is wrong with the answer."""


def read_rows(path: Path, fields: Sequence[str]) -> list[Row]:
    """The objects of a JSON-lines file.

    Raises:
        ConfigError: it cannot be read, is empty, or a line is no object with these fields, all texts.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON texts may hold other line ends, such as U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}") from error
    rows = [_row(path, number, line, fields) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"{path} holds no problem")
    return rows


def _row(path: Path, number: int, line: str, fields: Sequence[str]) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
    missing = [name for name in fields if not isinstance(row, dict) or not isinstance(row.get(name), str)]
    if missing:
        raise ConfigError(f"{path}, line {number} has no text {missing[0]!r}; is it the data of this task?")
    return dict(row)


def evenly(items: Sequence[_T], count: int | None) -> list[_T]:
    """`count` items, evenly spaced from the first on; None takes all.

    Raises:
        ConfigError: there are fewer.
    """
    count = len(items) if count is None else count
    if not 0 <= count <= len(items):
        raise ConfigError(f"{count} problems were asked for, the data holds {len(items)}")
    return [items[i * len(items) // count] for i in range(count)]
