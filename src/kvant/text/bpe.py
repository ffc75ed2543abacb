"""Byte-pair encoders, built from vocabularies that are not stored as a tokenizer.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from types import MappingProxyType
from typing import Final, Literal

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from kvant.errors import CorruptModelError

Merges = Sequence[tuple[str, str]]
PrefixScheme = Literal["always", "first", "never"]

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEEPSEEK_V3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """How a byte-level encoder cuts a text before it merges within the pieces.

    Attributes:
        patterns: each cuts out its matches from the pieces that the one before it left.
        nfc: compose characters first.
        ignore_merges: a piece that is in the vocabulary is one token, whatever the merges give.
        adds_bos: texts begin with BOS where the files do not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_PLAIN = Splitting((_GPT2,))
_SINGLE_DIGITS = Splitting((r"\p{N}", _GPT2))
_LLAMA3 = Splitting((_CL100K,), ignore_merges=True, adds_bos=True)
_QWEN2 = Splitting((_CL100K.replace(r"\p{N}{1,3}", r"\p{N}"),), nfc=True)
_GPT4O = Splitting((_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_REST,))
_TEKKEN = Splitting((_CASED % ("", "") + r"|\p{N}" + _CASED_REST,), ignore_merges=True, adds_bos=True)
_CODER = Splitting(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"))
_V3 = Splitting((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3))

SPLITTINGS: Final[Mapping[str, Splitting]] = MappingProxyType(
    {
        **dict.fromkeys(("default", "gpt-2", "phi-2", "olmo", "mpt"), _PLAIN),
        **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r"), _SINGLE_DIGITS),
        **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _LLAMA3),
        **dict.fromkeys(("dbrx", "smaug-bpe"), replace(_LLAMA3, ignore_merges=False, adds_bos=False)),
        **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
        **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
        "tekken": _TEKKEN,
        "deepseek-coder": _CODER,
        "deepseek-v3": _V3,
    }
)
"""By the names that GGUF files give them (tokenizer.ggml.pre)."""


class Kind(IntEnum):
    """What a piece is; SentencePiece's numbers, which GGUF took over."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


STAND_ALONE: Final = frozenset({Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED})
"""Pieces that are found in a text before the text is split and merged."""


@dataclass(frozen=True)
class Piece:
    """An entry of a SentencePiece vocabulary; of two possible merges, the one that makes the higher score is done."""

    name: str
    score: float
    kind: int


def byte_level(names: Sequence[str], merges: Merges, splitting: Splitting) -> Backend:
    """An encoder over bytes.

    Args:
        names: of the tokens by id, in the alphabet of `spelling.BYTE_TO_CHAR`.
        merges: pairs of names, the first ones first.
        splitting: of the text, before pairs are merged.

    Raises:
        CorruptModelError: a name is there twice, or a merge makes something that has no name.
    """
    backend = _backend(names, merges, ignore_merges=splitting.ignore_merges)
    backend.normalizer = normalizers.NFC() if splitting.nfc else None
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns]
    to_names = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_names])
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece(pieces: Sequence[Piece], prefix: PrefixScheme) -> Backend:
    """An encoder over characters with "▁" for spaces; characters it does not know become bytes (`<0x0A>`).

    Args:
        pieces: by id.
        prefix: where a space is put before a text: "always" after special tokens too, or "first" in the text only.

    Raises:
        CorruptModelError: a name is there twice.
    """
    ranked = sorted((piece for piece in pieces if piece.kind == Kind.NORMAL), key=lambda piece: -piece.score)
    merges = all_merges([piece.name for piece in ranked])
    unknown = next((piece.name for piece in pieces if piece.kind == Kind.UNKNOWN), None)
    names = [piece.name for piece in pieces]
    backend = _backend(names, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    before = [normalizers.Prepend("▁")] if prefix == "always" else []
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
    if prefix == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    after = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*fallback, *after])
    return backend


def all_merges(names: Collection[str]) -> list[tuple[str, str]]:
    """Every way to make a name of two others, in the order of the names (the best first).

    Where a vocabulary is stored without merges, its encoder joins any two neighbours that make a piece, the best piece
    first. With these merges a byte-pair encoder does the same.
    """
    known = frozenset(names)
    return [
        (name[:cut], name[cut:])
        for name in names
        for cut in range(len(name) - 1, 0, -1)
        if name[:cut] in known and name[cut:] in known
    ]


def _backend(names: Sequence[str], merges: Merges, **options: object) -> Backend:
    ids = {name: token for token, name in enumerate(names)}
    if len(ids) != len(names):
        twice = next(name for token, name in enumerate(names) if ids[name] != token)
        raise CorruptModelError(f"the token {twice!r} is twice in the tokenizer's vocabulary")
    try:
        return Backend(models.BPE(vocab=ids, merges=list(merges), **options))
    except Exception as error:  # the library raises nothing narrower
        raise CorruptModelError(f"the tokenizer's vocabulary and merges do not fit together: {error}") from error
