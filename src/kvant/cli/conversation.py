"""The turns of `kvant chat`: reading a message, streaming an answer, telling what it took."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import typer
from rich.console import Console

from kvant.errors import RequestError

if TYPE_CHECKING:
    from kvant.cache.store import MemoryReport
    from kvant.engine.outputs import Delta
    from kvant.pipelines import Session

HELP = '''\
/reset  forget the conversation
/help   this list
/exit   leave (so does Ctrl-D)
A message of several lines begins and ends with """. Ctrl-C stops an answer.'''

_COMMAND = re.compile(r"/\w+")
_FENCE = '"""'


class Voice:
    """Where things are said: answers on stdout, all else on stderr."""

    def __init__(self, memory: MemoryReport | None = None) -> None:
        """With `memory`, each answer is followed by its statistics."""
        self._memory = memory
        self._aside = Console(stderr=True, highlight=False, soft_wrap=True)

    def answer(self, deltas: Generator[Delta, None, None]) -> None:
        """Say an answer as it comes. However that ends, `deltas` is closed, which stops the request."""
        last = None
        with contextlib.closing(deltas):
            for delta in deltas:
                typer.echo(delta.text, nl=False)
                last = delta
        typer.echo()
        if last is not None and self._memory is not None:
            for line in statistics(last, self._memory):
                self.tell(line)

    def tell(self, text: str) -> None:
        """Say something that is no part of an answer."""
        self._aside.print(text, style="dim", markup=False)


def converse(session: Session, voice: Voice) -> None:
    """Take turns until /exit or the end of the input."""
    # Gives input() history and editing keys, where there is such a library.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    for text in _messages():
        if _COMMAND.fullmatch(text) is None:
            _take_turn(session, voice, text)
        elif text == "/exit":
            return
        else:
            _obey(session, voice, text)


def _take_turn(session: Session, voice: Voice, text: str) -> None:
    try:
        voice.answer(session.stream(text))
    except KeyboardInterrupt:
        typer.echo()
        voice.tell("(stopped)")
    except RequestError as error:
        voice.tell(f"error: {error} (/reset forgets the conversation)")


def _obey(session: Session, voice: Voice, command: str) -> None:
    if command == "/reset":
        session.reset()
        voice.tell("(forgotten)")
    elif command == "/help":
        voice.tell(HELP)
    else:
        voice.tell(f"{command} is not a command; /help lists them")


def statistics(last: Delta, memory: MemoryReport) -> list[str]:
    """What an answer took, by its last delta; and the KV cache's memory."""
    lines = []
    if last.usage is not None and last.timings is not None:
        usage, timings = last.usage, last.timings
        lines += [
            f"{usage.prompt_tokens} tokens read ({usage.cached_tokens} of them from the cache), "
            f"{usage.completion_tokens} written at {timings.tokens_per_second:.1f} tokens/s, "
            f"the first after {timings.time_to_first_token:.2f} s"
        ]
    return [*lines, memory.describe()]


def _messages() -> Iterator[str]:
    """The user's messages, stripped; empty ones are left out."""
    while (line := _read(">>> ")) is not None:
        text = line.strip()
        if text.startswith(_FENCE):
            text = _read_fenced(text.removeprefix(_FENCE))
        if text:
            yield text


def _read_fenced(text: str) -> str:
    while not text.rstrip().endswith(_FENCE):
        line = _read("... ")
        if line is None:
            break
        text = f"{text}\n{line}"
    return text.strip().removesuffix(_FENCE).strip()


def _read(prompt: str) -> str | None:
    """The next line without its newline; None at the end. Only a terminal is prompted."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None
    try:
        return input(prompt)
    except EOFError:
        typer.echo(err=True)
        return None
