"""What a caller may give as a prompt, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from kvant.errors import RequestError
from kvant.text.chat import encode_chat
from kvant.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


def is_single_prompt(prompt: Any) -> bool:
    """Whether this is one prompt rather than a batch of them: a string, token ids, or chat messages."""
    return isinstance(prompt, str) or (isinstance(prompt, Sequence) and bool(prompt) and _is_item(prompt[0]))


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, **template_kwargs: Any) -> list[int]:
    """The token ids of a prompt: a text as it stands, messages through the chat template, token ids unchanged.

    Raises:
        RequestError: it is none of these, or empty, or the template refuses it.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if isinstance(prompt, Sequence) and prompt:
        if all(isinstance(item, Mapping) for item in prompt):
            return encode_chat(tokenizer, prompt, **template_kwargs)  # type: ignore[arg-type]
        if all(isinstance(item, Integral) and not isinstance(item, bool) for item in prompt):
            return [int(item) for item in prompt]  # type: ignore[arg-type]
    raise RequestError("a prompt is a text, a list of chat messages ({'role', 'content'}) or a list of token ids")


def _is_item(item: Any) -> bool:
    return isinstance(item, (Integral, Mapping))
