"""Made-up problems of the tasks, and their files."""

from __future__ import annotations

import json
from pathlib import Path

from humaneval import HumanEvalProblem

ADD = HumanEvalProblem(
    name="made/0",
    prompt='import math\n\ndef one():\n    return 1\n\ndef add(a: int, b: int) -> int:\n    """ The sum.\n    """\n',
    entry_point="add",
    test="def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n",
)


def write_lines(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def gsm8k_rows() -> list[dict[str, str]]:
    train = [
        {"split": "train", "question": f"Example {i}?", "answer": f"<<1+{i}={1 + i}>>So.\n#### {1 + i}"} for i in (0, 1)
    ]
    return [{"split": "test", "question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(6)] + train
