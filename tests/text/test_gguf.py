"""Tokenizers from GGUF metadata against other implementations of the same rules."""

from __future__ import annotations

import time
import unicodedata
from functools import cache
from itertools import pairwise

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.errors import CorruptModelError, UnsupportedModelError
from kvant.text.bpe import SPLITTINGS
from kvant.text.gguf import tokenizer_from_gguf
from kvant.text.spelling import BYTE_TO_CHAR
from kvant.weights.sources.gguf import GgufSource

# Characters that every version of Unicode since 14 agrees on, without the bytes that SmolLM2 has no token for.
ASSIGNED = st.characters(
    exclude_categories=["Cs", "Cn", "Co"], exclude_characters="\x04\x06\x13\x14\x16\x1d", max_codepoint=0x3FFFF
)
TEXTS = st.one_of(st.text(ASSIGNED), st.text(" \n\t'sabcS019.é你😀=\u0301", max_size=40)).filter(
    lambda text: not regex.search("<.+>", text)  # a special token, perhaps
)

# The rules as their models published them, for a second implementation of regular expressions.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "qwen2": [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST],
    "llama-bpe": [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST],
    "gpt-4o": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


def cut(text: str, patterns: list[str]) -> list[str]:
    pieces = [text]
    for pattern in patterns:
        rule = regex.compile(f"({pattern})")
        pieces = [part for piece in pieces for part in rule.split(piece) if part]
    return pieces


class Slow:
    """Byte-pair encoding as the textbook has it: join the pair of the lowest rank until there is none."""

    def __init__(self, metadata):
        self.ids = {name: i for i, name in enumerate(metadata["tokenizer.ggml.tokens"])}
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])}
        self.word = cache(self._word)

    def encode(self, text, patterns):
        return [token for piece in cut(text, patterns) for token in self.word(piece)]

    def _word(self, piece):
        names = [BYTE_TO_CHAR[byte] for byte in piece.encode()]
        while len(names) > 1:
            pairs = list(pairwise(names))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            at = pairs.index(best)
            names[at : at + 2] = ["".join(best)]
        return [self.ids[name] for name in names]


@pytest.fixture(scope="module")
def slow(metadata):
    return Slow(metadata)


@settings(deadline=None)
@given(text=TEXTS)
def test_smollm2_encodes_as_the_textbook_does(smollm2_tokenizer, slow, text):
    ids = smollm2_tokenizer.encode(text)
    assert ids == slow.encode(text, PUBLISHED["smollm"])
    assert smollm2_tokenizer.decode(ids) == text


def test_smollm2_known_facts(smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (1, 2, 0, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert set(tokenizer.end_ids) == {0, 2}
    assert tokenizer.vocab_size == 49152
    assert [tokenizer.token_text(i) for i in tokenizer.encode("in 2024")] == ["in", " ", "2", "0", "2", "4"]
    assert tokenizer.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert tokenizer.is_special(2)
    assert not tokenizer.is_special(4093)
    assert tokenizer.chat_template.startswith("{% for message in messages %}")


@pytest.mark.slow
def test_qwen2_known_facts(qwen_coder):
    tokenizer = tokenizer_from_gguf(GgufSource(qwen_coder).metadata)
    assert tokenizer.encode("Hello world, don't!") == [9707, 1879, 11, 1513, 944, 0]
    assert tokenizer.encode("cafe\u0301 12") == tokenizer.encode("caf\u00e9 12")
    assert [tokenizer.token_text(i) for i in tokenizer.encode("12 \n\n x")] == ["1", "2", " \n\n", " x"]
    assert (tokenizer.eos_token, tokenizer.end_ids) == ("<|im_end|>", (151645, 151643))
    call = tokenizer.encode("<tool_call>")
    assert tokenizer.decode(call) == "<tool_call>"
    assert len(call) == 1


def test_smollm2_is_ready_in_a_moment(metadata):
    start = time.perf_counter()
    tokenizer_from_gguf(metadata)
    assert time.perf_counter() - start < 1.5  # 0.1 s on an idle core


@pytest.mark.parametrize("pre", PUBLISHED)
@given(text=TEXTS)
def test_texts_are_cut_as_published(byte_keys, pre, text):
    tokenizer = splitter(byte_keys, pre)
    text = unicodedata.normalize("NFC", text) if SPLITTINGS[pre].nfc else text
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    names = ["".join(BYTE_TO_CHAR[byte] for byte in piece.encode()) for piece in cut(text, PUBLISHED[pre])]
    assert [name for name, _ in pieces] == names


@cache
def splitter(byte_keys, pre):
    return tokenizer_from_gguf(byte_keys(pre=pre))


@pytest.mark.parametrize("pre", SPLITTINGS)
@given(text=st.text())
@settings(max_examples=25)
def test_every_splitting_loses_nothing(byte_keys, pre, text):
    tokenizer = splitter(byte_keys, pre)
    expected = unicodedata.normalize("NFC", text) if SPLITTINGS[pre].nfc else text
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_deepseek_and_tekken_cut_digits_and_cases_their_own_way(byte_keys):
    def pieces(pre, text):
        return [name for name, _ in splitter(byte_keys, pre).backend.pre_tokenizer.pre_tokenize_str(text)]

    assert pieces("deepseek-v3", "a12345") == ["a", "123", "45"]
    assert pieces("deepseek-coder", "x=12\ny") == ["x", "=", "1", "2", "Ċ", "y"]
    assert pieces("tekken", "camelCase 12") == ["camel", "Case", "Ġ", "1", "2"]


def test_bos_and_eos_go_where_the_file_says(byte_keys):
    hello = tokenizer_from_gguf(byte_keys()).encode("hello")
    assert len(hello) == 1
    framed = tokenizer_from_gguf(byte_keys(add_bos_token=True, add_eos_token=True))
    assert framed.encode("hello") == [framed.bos_id, *hello, framed.eos_id]
    assert framed.encode("hello", add_special_tokens=False) == hello
    assert tokenizer_from_gguf(byte_keys(pre="llama-bpe")).encode("hello") == [framed.bos_id, *hello]
    assert tokenizer_from_gguf(byte_keys(pre="llama-bpe", add_bos_token=False)).encode("hello") == hello


def test_control_and_user_defined_tokens(byte_keys):
    tokenizer = tokenizer_from_gguf(byte_keys())
    ids = tokenizer.encode("<|begin|><think>hello")
    assert [tokenizer.token_text(i) for i in ids] == ["<|begin|>", "<think>", "hello"]
    assert tokenizer.decode(ids) == "<think>hello"


def test_all_marks_of_an_end_are_found(byte_keys):
    assert tokenizer_from_gguf(byte_keys(eos_token_id=261, eot_token_id=5)).end_ids == (261, 5, 262)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "bert"}, UnsupportedModelError, "'bert'.*'gpt2' and 'llama'"),
        ({"model": None}, UnsupportedModelError, "None"),
        ({"pre": "kimi-k2"}, UnsupportedModelError, "'kimi-k2'.*qwen2"),
        ({"tokens": None}, CorruptModelError, "tokenizer.ggml.tokens"),
        ({"merges": None}, CorruptModelError, "tokenizer.ggml.merges"),
        ({"merges": ["h xyz"]}, CorruptModelError, "xyz"),
        ({"token_type": [1]}, CorruptModelError, "264 tokens but 1 token types"),
        ({"tokens": ["a", "b", "a"], "token_type": None, "merges": []}, CorruptModelError, "'a' is twice"),
        ({"add_bos_token": True, "bos_token_id": 999}, CorruptModelError, r"\[999\]"),
        ({"merges": ["one"]}, CorruptModelError, "do not fit"),
        ({"tokens": [1, 2], "token_type": None, "merges": []}, CorruptModelError, "do not fit"),
        ({"eos_token_id": "2"}, CorruptModelError, "malformed"),
        ({"pre": ["qwen2"]}, CorruptModelError, "malformed"),
        ({"token_type": 5}, CorruptModelError, "malformed"),
    ],
)
def test_what_does_not_fit_is_named(byte_keys, changes, error, words):
    with pytest.raises(error, match=words):
        tokenizer_from_gguf(byte_keys(**changes))


@pytest.fixture(scope="module")
def llama(train_sentencepiece, sentencepiece_keys):
    """A SentencePiece model, by its own library and by ours."""
    from sentencepiece import SentencePieceProcessor

    model = train_sentencepiece()
    return SentencePieceProcessor(model_proto=model), tokenizer_from_gguf(sentencepiece_keys(model))


@settings(deadline=None)
@given(text=TEXTS)
def test_sentencepiece_is_encoded_as_its_own_library_does(llama, text):
    theirs, ours = llama
    text = text.replace("\0", "")
    ids = theirs.encode(text)
    assert ours.encode(text) == [1, *ids]
    assert ours.decode(ids) == theirs.decode(ids)


def test_sentencepiece_bytes_and_spaces(llama):
    _, tokenizer = llama
    newline = tokenizer.backend.token_to_id("<0x0A>")
    the = tokenizer.encode("the", add_special_tokens=False)[0]
    assert tokenizer.token_bytes(newline) == b"\n"
    assert tokenizer.token_text(the) == " the"
    assert tokenizer.decode([the]) == "the"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (1, 2, 0)


def test_sentencepiece_marks_are_never_merged_from_text(llama):
    _, tokenizer = llama
    ids = tokenizer.encode("<0x41>", add_special_tokens=False)
    assert tokenizer.backend.token_to_id("<0x41>") not in ids
    assert tokenizer.decode(ids) == "<0x41>"


def test_a_space_goes_before_the_text_after_a_mark(llama):
    """As llama.cpp and the older Llama tokenizers do it."""
    _, tokenizer = llama
    ids = tokenizer.encode("<s>the", add_special_tokens=False)
    assert ids == [1, *tokenizer.encode("the", add_special_tokens=False)]


def test_phi3_marks_take_the_white_space_after_them(train_sentencepiece, sentencepiece_keys):
    keys = sentencepiece_keys(train_sentencepiece(control_symbols=["<|user|>"]))
    phi3 = tokenizer_from_gguf({**keys, "general.architecture": "phi3"})
    llama = tokenizer_from_gguf({**keys, "general.architecture": "llama"})
    assert phi3.encode("<|user|>\nthe") == llama.encode("<|user|>the") != llama.encode("<|user|>\nthe")


@pytest.mark.parametrize("scores", [None, [0.5], 5])
def test_a_score_is_needed_for_each_token(train_sentencepiece, sentencepiece_keys, scores):
    keys = sentencepiece_keys(train_sentencepiece()) | {"tokenizer.ggml.scores": scores}
    with pytest.raises(CorruptModelError, match="scores"):
        tokenizer_from_gguf(keys)
