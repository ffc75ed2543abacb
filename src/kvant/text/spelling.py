"""How the names of tokens spell bytes: what a `tokenizers` decoder does to a whole text, one token at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from tokenizers import Tokenizer as Backend

from kvant.errors import UnsupportedModelError

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)

BYTE_TO_CHAR: Final[Mapping[int, str]] = MappingProxyType(
    {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
)
"""Byte-level BPE names a token by one printable character for each of its bytes."""

_CHAR_TO_BYTE: Final[Mapping[str, int]] = MappingProxyType({char: byte for byte, char in BYTE_TO_CHAR.items()})
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Spelling:
    """From the names of tokens to bytes; a text is the bytes of its tokens, read as UTF-8.

    Attributes:
        byte_level: names are in the alphabet of `BYTE_TO_CHAR`; a name with any other character stands for itself.
        byte_fallback: `<0x0A>` stands for the byte 0x0A.
        replacements: (old, new) pairs, applied in turn to names ("▁" to a space).
        leading_spaces: how many spaces at the start of a text are no part of it.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    leading_spaces: int = 0

    def spell(self, name: str) -> bytes:
        """The bytes that the token of this name stands for; they may be a part of a character."""
        if self.byte_level:
            try:
                return bytes([_CHAR_TO_BYTE[char] for char in name])
            except KeyError:
                return name.encode()
        for old, new in self.replacements:
            name = name.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(name) if self.byte_fallback else None
        return bytes.fromhex(match[1]) if match else name.encode()

    def strip(self, text: str) -> str:
        """A whole text without the spaces that its tokenizer put before it."""
        spaces = len(text) - len(text.lstrip(" "))
        return text[min(spaces, self.leading_spaces) :]


def spelling_of(backend: Backend) -> Spelling:
    """What the tokenizer's own decoder does.

    Raises:
        UnsupportedModelError: the decoder is of another kind than language models that generate text have.
    """
    if backend.decoder is None:
        raise UnsupportedModelError("the tokenizer has no decoder: it cannot turn tokens into text")
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    spelling = Spelling()
    for step in steps:
        spelling = _with_step(spelling, step)
    return spelling


def _with_step(spelling: Spelling, step: Mapping[str, Any]) -> Spelling:
    match step:
        case {"type": "ByteLevel"}:
            return replace(spelling, byte_level=True)
        case {"type": "ByteFallback"}:
            return replace(spelling, byte_fallback=True)
        case {"type": "Fuse"}:
            return spelling
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return replace(spelling, replacements=(*spelling.replacements, (old, new)))
        case {"type": "Metaspace", "replacement": old, "prepend_scheme": scheme}:
            replacements = (*spelling.replacements, (old, " "))
            return replace(spelling, replacements=replacements, leading_spaces=0 if scheme == "never" else 1)
        case {"type": "Strip", "content": " ", "start": start, "stop": 0}:
            return replace(spelling, leading_spaces=start)
    raise UnsupportedModelError(f"the tokenizer decodes with {dict(step)}, which kvant does not know")
