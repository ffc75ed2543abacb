"""What counts as a right answer: reading GSM8K's and HumanEval's answers, and running code."""

from __future__ import annotations

import time
from decimal import Decimal

import pytest
from gsm8k import Gsm8kProblem, final_number, read_gsm8k
from humaneval import STOP, read_humaneval
from problems import evenly, read_rows
from sandbox import Limits, run_program

from kvant.errors import ConfigError
from kvant.text.stream import TextStream
from kvant.weights.load import open_source
from kvant.weights.tokenizer import read_tokenizer
from tests.benchmarks.made_up import ADD, gsm8k_rows, write_lines
from tests.engine.checkpoint import write_checkpoint

SUM = "def add(a, b):\n    return a + b\n"


# GSM8K


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 7 = 42\n#### 42", 42),
        ("#### 41\nNo, wait.\n#### 42\nas 40 + 2 shows", 42),
        ("#### $1,234.50", "1234.5"),
        ("#### -3", -3),
        ("#### Step 1\nTake 5.\n#### Step 2\nAdd 2: that is 7.", 7),
        ("The answer is \\boxed{18}.", 18),
        ("That makes 10-5 dollars", 5),
        ("She owes -$12.", -12),
        ("between 1,000, and 2,000.", 2000),
        ("no idea", None),
    ],
)
def test_the_marked_number_counts_or_else_the_last(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_not_spellings():
    problem = Gsm8kProblem("test/0", "How many?", Decimal(1000))
    assert [problem.judge(text) for text in ("#### 1,000.00", "#### 1000", "#### 100", "many")] == [
        "passed", "passed", "wrong number", "no number",
    ]  # fmt: skip


def test_examples_come_from_the_training_rows_and_problems_from_the_others(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", gsm8k_rows())
    problems = read_gsm8k(path, 3, shots=2)
    assert [(p.name, p.question, p.expected) for p in problems] == [
        ("test/0", "What is 0 + 1?", 1), ("test/2", "What is 2 + 1?", 3), ("test/4", "What is 4 + 1?", 5),
    ]  # fmt: skip
    chat = problems[1].messages
    assert [message["role"] for message in chat] == ["user", "assistant", "user", "assistant", "user"]
    assert chat[0]["content"].endswith("\n\nExample 0?")
    assert chat[1]["content"] == "So.\n#### 1"
    assert chat[-1]["content"] == "What is 2 + 1?"
    assert read_gsm8k(path, 1, shots=0)[0].messages[0]["content"].endswith("\n\nWhat is 0 + 1?")
    for shots in (3, -1):
        with pytest.raises(ConfigError, match=f'{shots} examples were asked for, .* has 2 rows of split "train"'):
            read_gsm8k(path, 1, shots)


# HumanEval


@pytest.mark.parametrize(
    "answer",
    [
        f"```python\n{SUM}```",
        f"Here it is:\n\n```python\n{SUM}```\n\nIt adds.",
        f"Here it is:\n```\n{SUM}",  # cut off before the closing fence, or by the stop string
        f"First an idea:\n```python\nx = 1\n```\nthen the function:\n```python\n{SUM}```",
        "* so:\n  ```python\n  def add(a, b):\n      return a + b\n  ```",
        SUM,
        "    return a + b\n",
        "return a + b",
        "```python\n    return a + b\n```",
        "```python\ndef add(a, b):\n    return helper(a) + b\n\ndef helper(a):\n    return a * one()\n```",
        f"```python\n{SUM}\nassert add(1, 1) == 3\nprint(add(1))\nn = int(input())\nif n:\n    add(n)\n```",
        f"```python\n{SUM}\n# Example\nfor x in [(1, 2), (3,",
        "```python\nZERO = 0\n\ndef add(a, b):\n    return math.floor(a + b + ZERO)\n```",
    ],
)
def test_code_is_found_in_the_forms_that_answers_take(answer):
    assert ADD.judge(answer) == "passed"


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ("```python\ndef add(a, b):\n    return a - b\n```", "AssertionError"),
        ("```python\ndef add(a, b):\n    return a +\n```", "no code"),
        ("```python\ndef add(a, b):\n    if a == 2:\n        return 5\n    retrun 0\n```", "no code"),
        ("```python\ndef sub(a, b):\n    return a + b\n```", "AssertionError"),
        ("I cannot help with that.", "no code"),
        ("", "no code"),
        ("```python\nimport sys\n\ndef add(a, b):\n    sys.exit(0)\n```", "SystemExit"),
        ("```python\nimport os\n\ndef add(a, b):\n    os._exit(0)\n```", "died"),
    ],
)
def test_a_wrong_answer_does_not_pass(answer, outcome):
    assert ADD.judge(answer) == outcome


def test_the_stop_string_ends_an_answer_after_its_code_and_not_before(tmp_path):
    tokenizer = read_tokenizer(open_source(write_checkpoint(tmp_path / "tiny")))

    def said(text: str) -> str:
        stream = TextStream(tokenizer, STOP)
        return stream.push(tokenizer.encode(text)) + stream.flush()

    assert said(f"Here:\n\n```\n{SUM}```\n\nIt adds.\n") == f"Here:\n\n```\n{SUM.rstrip()}"
    assert said(f"Here:\n\n```python\n{SUM}```\n\nIt adds.\n") == f"Here:\n\n```python\n{SUM.rstrip()}"


def test_humaneval_rows_become_problems(tmp_path):
    row = {"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": "", "canonical_solution": ""}
    path = write_lines(tmp_path / "data.jsonl", [row | {"task_id": f"T/{i}"} for i in range(5)])
    problems = read_humaneval(path, 2)
    assert [problem.name for problem in problems] == ["T/0", "T/2"]
    assert "```python\ndef f():\n```" in problems[0].messages[0]["content"]


# Data


def test_problems_are_spread_evenly():
    assert evenly(range(164), 4) == [0, 41, 82, 123]
    assert evenly("abc", None) == evenly("abc", 3) == ["a", "b", "c"]
    with pytest.raises(ConfigError, match="4 problems were asked for, the data holds 3"):
        evenly("abc", 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no problem"),
        ('{"a": "1"}\n{"a": ', "line 2 is not JSON"),
        ('{"b": "1"}', "line 1 has no text 'a'"),
        ("[1]", "line 1 has no text 'a'"),
    ],
)
def test_data_that_is_none_is_refused(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_rows(path, ["a"])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl", ["a"])


# The sandbox


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("x = 1", "passed"),
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "died"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "died"),
        ("input()", "EOFError"),
        ("x = bytearray(2**31)", "MemoryError"),
        ("open('f', 'wb').write(bytes(2**21))", "OSError"),
        ("print('x' * 2**24); import sys; sys.stderr.write('x' * 2**24)", "passed"),
        ("import numpy", "ModuleNotFoundError"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()", "passed|RuntimeError"),
        ("assert __name__ == '__main__'; import sys; assert sys.modules['__main__'].__dict__ is globals()", "passed"),
    ],
)
def test_a_program_ends_as_it_ends(program, outcome):
    assert run_program(program) in outcome.split("|")


@pytest.mark.parametrize(
    ("program", "limits", "outcome"),
    [
        ("while True: pass", Limits(cpu_seconds=1), "timeout"),
        ("while True: print('x' * 1000)", Limits(cpu_seconds=1), "timeout"),
        ("import signal as s; s.signal(s.SIGXCPU, s.SIG_IGN)\nwhile True: pass", Limits(cpu_seconds=1), "died"),
        ("import time; time.sleep(60)", Limits(wall_seconds=0.5), "timeout"),
    ],
)
def test_an_endless_program_is_ended(program, limits, outcome):
    started = time.monotonic()
    assert run_program(program, limits) == outcome
    assert time.monotonic() - started < 30


def test_a_flood_past_the_guard_stays_small():
    """Even a program that writes to the verdict's own file is held by the file limit."""
    flood = "while os.write(fd, bytes(65536)): pass"
    flood = f"import os\nfor fd in range(3, 64):\n    try:\n        {flood}\n    except OSError: pass"
    assert run_program(flood) == "died"


def test_a_program_sees_neither_the_environment_nor_the_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.chdir(tmp_path)
    program = "import os; assert 'SECRET' not in os.environ; assert not os.listdir(); open('f', 'w').write('x')"
    assert run_program(program) == "passed"
    assert list(tmp_path.iterdir()) == []


def test_what_a_program_started_ends_with_it(tmp_path):
    mark = tmp_path / "mark"
    program = f"import subprocess; subprocess.Popen(['/bin/sh', '-c', 'sleep 1; touch {mark}'])"
    assert run_program(program) in ("passed", "BlockingIOError")  # the limit on processes does not bind root
    time.sleep(1.5)
    assert not mark.exists()


def test_the_order_of_a_set_is_the_same_in_every_run():
    program = "first = next(iter({f'word{i}' for i in range(20)})); raise type(first, (Exception,), {})"
    first = run_program(program)
    assert first.startswith("word")
    assert [run_program(program) for _ in range(3)] == [first] * 3
