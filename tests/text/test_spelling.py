"""Tokens spell what the `tokenizers` library's own decoders make of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from kvant.errors import UnsupportedModelError
from kvant.text.spelling import BYTE_TO_CHAR, spelling_of

FALLBACK = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "byte level": decoders.ByteLevel(),
    "llama": decoders.Sequence([*FALLBACK, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence(FALLBACK),
    "metaspace": decoders.Metaspace("▁", "always"),
    "metaspace without prefix": decoders.Metaspace("▁", "never"),
}
NAMES = st.lists(st.sampled_from(["▁", "▁the", "the", "é", "你", "Ġdog", "Ċ", "<0x0A>", "!"]))


def with_decoder(decoder):
    backend = Backend(models.BPE())
    backend.decoder = decoder
    return backend


@pytest.mark.parametrize("kind", DECODERS)
@given(names=NAMES)
def test_names_spell_what_the_decoder_says(kind, names):
    spelling = spelling_of(with_decoder(DECODERS[kind]))
    data = b"".join(spelling.spell(name) for name in names)
    assert spelling.strip(data.decode("utf-8", errors="replace")) == DECODERS[kind].decode(names)


def test_bytes_are_spelled_as_bytes():
    assert spelling_of(with_decoder(DECODERS["llama"])).spell("<0xE4>") == b"\xe4"
    assert spelling_of(with_decoder(DECODERS["byte level"])).spell("Ġé") == b" \xe9"
    assert spelling_of(with_decoder(DECODERS["byte level"])).spell("<｜end▁of▁text｜>").decode() == "<｜end▁of▁text｜>"


def test_the_alphabet_is_the_librarys():
    assert sorted(BYTE_TO_CHAR.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(BYTE_TO_CHAR) == 256


@pytest.mark.parametrize(
    "decoder",
    [decoders.WordPiece(), decoders.BPEDecoder(), decoders.CTC(), decoders.Strip("_", 1, 0), decoders.Strip(" ", 0, 1)],
    ids=lambda decoder: type(decoder).__name__,
)
def test_other_decoders_are_refused(decoder):
    with pytest.raises(UnsupportedModelError, match=type(decoder).__name__):
        spelling_of(with_decoder(decoder))
