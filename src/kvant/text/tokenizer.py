"""Between text and token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from kvant.errors import CorruptModelError, RequestError
from kvant.text.spelling import spelling_of
from kvant.text.template import ChatTemplate


class Tokenizer:
    """A model's own tokenizer, and what its files say about special tokens and chats. Immutable and thread-safe.

    `load_tokenizer` (directory.py) and `tokenizer_from_gguf` (gguf.py) make one.

    Attributes:
        backend: the `tokenizers.Tokenizer` that encodes.
        bos_id, eos_id, unk_id, pad_id: None where the model has no such token.
        end_ids: all ids that end a text or a turn; `eos_id` is the first.
        templates: the chat templates by name. "default" is for all chats, "tool_use" for those with tools.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        unk_id: int | None = None,
        pad_id: int | None = None,
        end_ids: Iterable[int] = (),
        templates: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = bos_id, eos_id, unk_id, pad_id
        self.end_ids = tuple(dict.fromkeys([*([] if eos_id is None else [eos_id]), *end_ids]))
        self._spelling = spelling_of(backend)
        self._special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        named = {"bos_token": bos_id, "eos_token": eos_id, "unk_token": unk_id, "pad_token": pad_id}
        variables = {name: token for name, i in named.items() if (token := self.token_name(i)) is not None}
        self.templates = {name: ChatTemplate(source, variables) for name, source in (templates or {}).items()}

    @cached_property
    def vocab_size(self) -> int:
        """The largest token id + 1. A model's logits may have more columns."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def bos_token(self) -> str | None:
        """The text of the token that begins a text."""
        return self.token_name(self.bos_id)

    @property
    def eos_token(self) -> str | None:
        """The text of the token that ends a text."""
        return self.token_name(self.eos_id)

    @property
    def chat_template(self) -> str | None:
        """The source of the template for chats, None for a model that has none."""
        template = self.template_for()
        return template.source if template else None

    def template_for(self, tools: Any = None) -> ChatTemplate | None:
        """The template for a chat with these tools."""
        default = self.templates.get("default")
        return self.templates.get("tool_use", default) if tools else default

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text. Special tokens that are written out in the text become those tokens.

        Args:
            text: any length; an empty one gives no ids but the special ones.
            add_special_tokens: put BOS before it and EOS after it where the model's own tokenizer does.

        Raises:
            RequestError: it is no string, or holds half of a surrogate pair.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise RequestError("a text to encode must be a string of whole Unicode characters") from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of these ids. Bytes that are not UTF-8 become U+FFFD, ids that stand for nothing become nothing."""
        data = b"".join(self.token_bytes(i) for i in ids if not (skip_special_tokens and self.is_special(i)))
        return self._spelling.strip(data.decode("utf-8", errors="replace"))

    def token_name(self, token_id: int | None) -> str | None:
        """What the vocabulary calls a token; None for an id that is not used."""
        try:
            return None if token_id is None else self.backend.id_to_token(token_id)
        except OverflowError:  # negative, or larger than the library's ids
            return None

    def token_text(self, token_id: int) -> str:
        """One token's text, a leading space included; U+FFFD for bytes that are not a whole character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, which may be a part of a character; nothing for an id that is not used."""
        name = self.token_name(token_id)
        return b"" if name is None else self._spelling.spell(name)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a mark of the model's (BOS, a turn's end) and no part of a text."""
        return token_id in self._special

    @property
    def leading_spaces(self) -> int:
        """How many spaces `decode` drops at the start of a text: those that `encode` put there."""
        return self._spelling.leading_spaces


def frame(backend: Backend, bos_id: int | None, eos_id: int | None) -> None:
    """Make `backend` put these ids before and after every text that is encoded with special tokens.

    Raises:
        CorruptModelError: an id stands for no token.
    """
    names = {i: backend.id_to_token(i) for i in (bos_id, eos_id) if i is not None}
    if missing := [i for i, name in names.items() if name is None]:
        raise CorruptModelError(f"the tokenizer frames texts with the ids {missing}, which are not in its vocabulary")
    before, after = ([names[i]] if i is not None else [] for i in (bos_id, eos_id))
    backend.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(name, i) for i, name in names.items()],
    )
