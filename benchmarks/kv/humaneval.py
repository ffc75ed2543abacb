"""HumanEval: functions to complete from their docstrings; the problem's own tests decide (pass@1).

Data: https://github.com/openai/human-eval (MIT), as JSON lines. What a model writes is executed: see sandbox.py for
what that means, and for what it does not protect from.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

from problems import Messages, evenly, read_rows
from sandbox import run_program

INSTRUCTION = (
    "Complete this Python function. Answer with the whole function, with the imports it needs, in one ```python code "
    "block, without examples and without explanations."
)
# A closing fence that an empty line follows: what comes then is explanation. An opening fence has code after it.
STOP = ("\n```\n\n",)
_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_EXAMPLES = (ast.Expr, ast.Assert, ast.If, ast.For, ast.While, ast.With)
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)


@dataclass(frozen=True)
class HumanEvalProblem:
    """A function's head and docstring, and the tests that it has to pass."""

    name: str
    prompt: str
    entry_point: str
    test: str

    @property
    def messages(self) -> Messages:
        """The chat that asks for the function."""
        return [{"role": "user", "content": f"{INSTRUCTION}\n\n```python\n{self.prompt.strip()}\n```"}]

    def judge(self, answer: str) -> str:
        """How the tests ended, run on what the answer defines."""
        program = self.program(answer)
        if program is None:
            return "no code"
        return run_program(f"{program}\n\n{self.test}\n\ncheck({self.entry_point})\n")

    def program(self, answer: str) -> str | None:
        """The prompt and the answer's code as one program; None where there is no code.

        The prompt by itself is a whole function that does nothing, so it may stay before one that replaces it: its
        imports and helpers are wanted. An answer that is only the function's body continues it.
        """
        code = extract_code(answer, self.entry_point)
        definitions = keep_definitions(code, self.entry_point)
        if definitions is not None:
            return f"{self.prompt}\n\n{definitions}"
        continued = self.prompt + textwrap.indent(textwrap.dedent(code), "    ")
        return continued if code.strip() and _parse(continued) is not None else None


def extract_code(answer: str, entry_point: str) -> str:
    """The first code block that defines the function, else the first, else the whole answer."""
    blocks: list[str] = _BLOCK.findall(answer)
    defining = [block for block in blocks if re.search(rf"\bdef\s+{entry_point}\b", block)]
    return (defining or blocks or [answer])[0]


def keep_definitions(code: str, entry_point: str) -> str | None:
    """The code without its examples (prints, asserts, calls of the function); None if it does not define the function.

    Whole statements are dropped from the end until Python can parse what is left: an answer that reached its limit
    may have ended in the middle of an example.
    """
    lines = textwrap.dedent(code).splitlines()
    starts = [i for i, line in enumerate(lines) if line[:1].strip()]
    for end in [len(lines), *reversed(starts)]:
        tree = _parse("\n".join(lines[:end]))
        if tree is not None:
            kept = [node for node in tree.body if not _is_example(node, entry_point)]
            defined = {node.name for node in kept if isinstance(node, ast.FunctionDef)}
            return ast.unparse(ast.Module(kept, [])) if entry_point in defined else None
    return None


def _is_example(node: ast.stmt, entry_point: str) -> bool:
    if isinstance(node, _ASSIGNMENTS):
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        return not names.isdisjoint({entry_point, "input"})
    return isinstance(node, _EXAMPLES)


def _parse(code: str) -> ast.Module | None:
    with warnings.catch_warnings(action="ignore"):
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: too deeply nested
            return None


def read_humaneval(path: Path, count: int | None) -> list[HumanEvalProblem]:
    """`count` problems of the file, evenly spaced (None: all).

    Raises:
        ConfigError: the file is not HumanEval's, or has too few problems.
    """
    fields = ["task_id", "prompt", "entry_point", "test"]
    rows = evenly(read_rows(path, fields), count)
    return [HumanEvalProblem(*(row[name] for name in fields)) for row in rows]
