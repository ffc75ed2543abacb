"""From tokens, as they come, to text that is certain: whole characters, and no beginning of a stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterator, Sequence

from kvant.text.tokenizer import Tokenizer


class TextStream:
    """The text of one output. A token costs the same wherever it stands in the text.

    Without a stop string, all pieces together are `tokenizer.decode` of all tokens. With one, the text ends before the
    stop string that is complete first (of several, the longest), however the tokens were grouped into pushes.

    Args:
        tokenizer: of the model.
        stop: strings that end the text; none is empty.
        skip_special_tokens: leave them out of the text.
        continues: the text goes on from a prompt, so that a leading space belongs to it.

    Attributes:
        stopped: the stop string that ended the text; None while there was none.
        token_count: how many of the pushed tokens it takes to write the text that was given out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        skip_special_tokens: bool = True,
        continues: bool = False,
    ) -> None:
        self.stopped: str | None = None
        self.token_count = 0
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._leading_spaces = 0 if continues else tokenizer.leading_spaces
        self._matchers = [_Matcher(text) for text in stop]
        self._given: list[str] = []
        self._given_length = 0
        self._held = ""
        # Tokens whose text was not given out yet: where it ends, in characters. `_counted` is where token_count ends.
        self._ends: deque[int] = deque()
        self._counted = 0

    @property
    def text(self) -> str:
        """Everything given out so far."""
        return "".join(self._given)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that has become certain with these tokens; nothing after a stop string."""
        if self.stopped is not None:
            return ""
        fresh = "".join(self._decoded(token_ids))
        return self._give(fresh)

    def flush(self) -> str:
        """The rest, when no token will follow."""
        if self.stopped is not None:
            return ""
        piece = self._give(self._stripped(self._utf8.decode(b"", final=True)))
        if self.stopped is None:
            piece += self._give_out(self._held)
        return piece

    def _decoded(self, token_ids: Sequence[int]) -> Iterator[str]:
        length = self._given_length + len(self._held)
        for token in token_ids:
            skipped = self._skip_special and self._tokenizer.is_special(token)
            data = b"" if skipped else self._tokenizer.token_bytes(token)
            text = self._stripped(self._utf8.decode(data))
            length += len(text)
            self._ends.append(length)
            yield text

    def _stripped(self, text: str) -> str:
        while self._leading_spaces and text:
            if not text.startswith(" "):
                self._leading_spaces = 0
                break
            self._leading_spaces -= 1
            text = text[1:]
        return text

    def _give(self, fresh: str) -> str:
        """Take in new characters; give out what no stop string can touch any more."""
        start = len(self._held)
        self._held += fresh
        for end, char in enumerate(fresh, start + 1):
            complete = [m.stop for m in self._matchers if m.advance(char)]
            if complete:
                self.stopped = max(complete, key=len)
                return self._give_out(self._held[: end - len(self.stopped)])
        pending = max((matcher.matched for matcher in self._matchers), default=0)
        return self._give_out(self._held[: len(self._held) - pending])

    def _give_out(self, piece: str) -> str:
        self._held = self._held[len(piece) :]
        self._given.append(piece)
        self._given_length += len(piece)
        while self._counted < self._given_length and self._ends:
            self._counted = self._ends.popleft()
            self.token_count += 1
        return piece


class _Matcher:
    """How much of a stop string the characters so far end with (Knuth, Morris, Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        # _borders[n]: the longest proper beginning of stop[:n] that stop[:n] also ends with.
        self._borders = [0, 0]
        for char in stop[1:]:
            self._borders.append(self._longer(self._borders[-1], char))

    def advance(self, char: str) -> bool:
        """Whether the stop string is complete with this character."""
        self.matched = self._longer(self.matched, char)
        return self.matched == len(self.stop)

    def _longer(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self._borders[matched]
        return matched + (self.stop[matched] == char)
