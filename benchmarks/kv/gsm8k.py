"""GSM8K: grade-school mathematics, answered with a chain of thought; the last number has to be right.

Data: https://github.com/openai/grade-school-math (MIT), as JSON lines with `question` and `answer`. The first rows
whose `split` is "train" serve as worked examples; those of another split, or of none, are problems.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from problems import PASSED, Messages, Row, evenly, read_rows

from kvant.errors import ConfigError

INSTRUCTION = 'Solve the problem step by step, in a few short lines. End with a line "#### " and the number alone.'
_NUMBER = r"(?:(?<![\w)])-)?\$?\d[\d,]*(?:\.\d+)?"  # the minus of "10-5" is no sign
_MARKED = re.compile(rf"####\s*({_NUMBER})")
_CALCULATION = re.compile(r"<<[^>]*>>")  # notes for a calculator, in the data's answers


@dataclass(frozen=True)
class Gsm8kProblem:
    """A question, the number that answers it, and the worked examples that go before it."""

    name: str
    question: str
    expected: Decimal
    examples: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> Messages:
        """The examples as turns of the chat, then the question. (Some models know no system message.)"""
        chat: Messages = []
        for question, answer in self.examples:
            chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        chat.append({"role": "user", "content": self.question})
        chat[0] = {"role": "user", "content": f"{INSTRUCTION}\n\n{chat[0]['content']}"}
        return chat

    def judge(self, answer: str) -> str:
        """Whether the answer's number is the expected one: 72.00 is 72, and 1,000 is 1000."""
        number = final_number(answer)
        if number is None:
            return "no number"
        return PASSED if number == self.expected else "wrong number"


def final_number(text: str) -> Decimal | None:
    """The number after the last "####" that has one, else the last number of the text."""
    found = _MARKED.findall(text) or re.findall(_NUMBER, text)
    return Decimal(re.sub("[$,]", "", found[-1])) if found else None


def read_gsm8k(path: Path, count: int | None, shots: int) -> list[Gsm8kProblem]:
    """`count` problems of the file, evenly spaced (None: all), each with `shots` worked examples.

    Raises:
        ConfigError: the file is not GSM8K's, or has too few problems or examples.
    """
    rows = read_rows(path, ["question", "answer"])
    training = [row for row in rows if row.get("split") == "train"]
    tests = [row for row in rows if row.get("split") != "train"]
    if not 0 <= shots <= len(training):
        found = f'{path} has {len(training)} rows of split "train"'
        raise ConfigError(f"{shots} examples were asked for, {found}; add some, or pass --shots 0")
    examples = tuple((row["question"], _CALCULATION.sub("", row["answer"])) for row in training[:shots])
    numbered = list(enumerate(tests))
    return [Gsm8kProblem(f"test/{i}", row["question"], _expected(row), examples) for i, row in evenly(numbered, count)]


def _expected(row: Row) -> Decimal:
    marked = _MARKED.search(row["answer"])
    if marked is None:
        raise ConfigError(f'an answer has no "#### number": {row["answer"][-60:]!r}; is this GSM8K?')
    return Decimal(re.sub("[$,]", "", marked[1]))
