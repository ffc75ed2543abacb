"""Log-probabilities in the two shapes that OpenAI's endpoints have for them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from kvant.engine.outputs import TokenLogprobs
from kvant.serve.schema import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from kvant.text.tokenizer import Tokenizer

# What stands for a probability of zero: JSON has no infinity.
LOWEST = -9999.0


def token_name(raw: bytes) -> str:
    r"""A token's bytes as text; those that are no whole characters as "bytes:\xe2\x80", so that none look alike."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> ChatLogprobs:
    """The entries as chat completions report them."""
    return ChatLogprobs(content=[_chat_entry(entry, tokenizer) for entry in entries])


def _chat_entry(entry: TokenLogprobs, tokenizer: Tokenizer) -> TokenLogprob:
    chosen = _top_entry(tokenizer.token_bytes(entry.token_id), entry.logprob)
    top = [_top_entry(tokenizer.token_bytes(token), logprob) for token, logprob in entry.top]
    return TokenLogprob(token=chosen.token, bytes=chosen.bytes, logprob=chosen.logprob, top_logprobs=top)


def _top_entry(raw: bytes, logprob: float) -> TopLogprob:
    return TopLogprob(token=token_name(raw), bytes=list(raw), logprob=max(logprob, LOWEST))


class CompletionLogprobsWriter:
    """The tokens of one choice as completions report them; it remembers how far into the text they are."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(
        self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None], echoed: str = ""
    ) -> CompletionLogprobs:
        """The next tokens and what is known of each: None for a prompt's first, which nothing predicts.

        `echoed` is the prompt's text, where these tokens are the prompt's.
        """
        reply = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, entry in zip(token_ids, entries, strict=True):
            reply.tokens.append(self._name(token))
            reply.token_logprobs.append(None if entry is None else max(entry.logprob, LOWEST))
            reply.top_logprobs.append(None if entry is None else self._top(entry))
            reply.text_offset.append(self._offset)
            self._offset += self._length(token, echoed)
        return reply

    def _length(self, token: int, echoed: str) -> int:
        """How many characters the token adds to the text."""
        text = self._decoder.decode(self._tokenizer.token_bytes(token))
        if self._tokenizer.is_special(token) and not echoed.startswith(text, self._offset):
            return 0
        # Some tokenizers put a space before every text, which is no part of it.
        added_space = self._offset == 0 and text.startswith(" ") and echoed and not echoed.startswith(" ")
        return len(text) - 1 if added_space else len(text)

    def _name(self, token: int) -> str:
        return token_name(self._tokenizer.token_bytes(token))

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        pairs = (*entry.top, (entry.token_id, entry.logprob))
        return {self._name(token): max(logprob, LOWEST) for token, logprob in pairs}
