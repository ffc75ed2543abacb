"""The tokenizer in the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Final

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from kvant.errors import CorruptModelError, UnsupportedModelError
from kvant.text import bpe
from kvant.text.tokenizer import Tokenizer, frame

_PREFIX = "tokenizer.ggml."

# Files name one token as the end of a text. Chat models also end a turn with one of these.
END_TOKENS: Final = frozenset(
    (
        "</s>",
        "<EOT>",
        "<|end|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|im_end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<｜end▁of▁sentence｜>",
    )
)
_SPM_DEFAULTS: Final = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}


class Kind(IntEnum):
    """What a token is: SentencePiece's numbers, which GGUF took over."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes; it encodes as llama.cpp does.

    Args:
        metadata: the file's keys and values as plain Python.

    Raises:
        UnsupportedModelError: a kind of tokenizer or of splitting that kvant does not know.
        CorruptModelError: keys are missing or do not fit together.
    """
    keys = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    match keys.get("model"):
        case "gpt2":
            backend, keys = _byte_level(keys)
        case "llama":
            backend, keys = _sentencepiece({**_SPM_DEFAULTS, **keys})
        case other:
            raise UnsupportedModelError(f"GGUF tokenizer {other!r} is not supported; kvant reads 'gpt2' and 'llama'")
    tokens = _tokens(keys)
    phi3 = keys["model"] == "llama" and metadata.get("general.architecture") == "phi3"
    backend.add_tokens([_added(name, kind, phi3) for name, kind in tokens if _stands_alone(name, kind)])
    return _with_special_tokens(backend, keys, _templates(metadata))


def _byte_level(keys: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    pre = keys.get("pre", "default")
    splitting = bpe.SPLITTINGS.get(pre)
    if splitting is None:
        known = ", ".join(bpe.SPLITTINGS)
        raise UnsupportedModelError(f"GGUF pre-tokenizer {pre!r} is not supported; kvant knows {known}")
    pairs = [merge.partition(" ") for merge in _required(keys, "merges")]
    backend = bpe.byte_level(_vocabulary(keys), [(left, right) for left, _, right in pairs], splitting)
    return backend, {"add_bos_token": splitting.adds_bos, **keys}


def _sentencepiece(keys: dict[str, Any]) -> tuple[Backend, dict[str, Any]]:
    scores = _required(keys, "scores")
    tokens = _tokens(keys)
    if len(scores) != len(tokens):
        raise CorruptModelError(f"{len(tokens)} tokens but {len(scores)} scores in the tokenizer")
    ranked = sorted(zip(scores, tokens, strict=True), key=lambda entry: -entry[0])
    merges = bpe.all_merges([name for _, (name, kind) in ranked if kind == Kind.NORMAL])
    unknown = keys["unknown_token_id"]
    unk = tokens[unknown][0] if unknown < len(tokens) else None
    prefix: bpe.PrefixScheme = "always" if keys.get("add_space_prefix", True) else "never"
    return bpe.sentencepiece(_vocabulary(keys), merges, unk, prefix), keys


def _required(keys: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = keys.get(name)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise CorruptModelError(f"the GGUF file has no {_PREFIX}{name}")
    return value


def _tokens(keys: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The name and kind of each token."""
    names = _required(keys, "tokens")
    kinds = keys.get("token_type") or [Kind.NORMAL] * len(names)
    if len(kinds) != len(names):
        raise CorruptModelError(f"{len(names)} tokens but {len(kinds)} token types in the tokenizer")
    return list(zip(names, kinds, strict=True))


def _vocabulary(keys: Mapping[str, Any]) -> dict[str, int]:
    names = _required(keys, "tokens")
    vocabulary = {name: token for token, name in enumerate(names)}
    if len(vocabulary) != len(names):
        twice = next(name for token, name in enumerate(names) if vocabulary[name] != token)
        raise CorruptModelError(f"the token {twice!r} is twice in the tokenizer's vocabulary")
    return vocabulary


def _stands_alone(name: str, kind: int) -> bool:
    """Whether the token is found in a text before the text is split and merged."""
    return bool(name) and kind in (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)


def _added(name: str, kind: int, phi3: bool) -> AddedToken:
    # Phi-3's marks take the white space after them; no key of the file says so.
    takes_space = phi3 and name not in ("<unk>", "<s>", "<|endoftext|>")
    special = kind != Kind.USER_DEFINED or name in END_TOKENS
    return AddedToken(name, special=special, normalized=False, rstrip=takes_space)


def _with_special_tokens(backend: Backend, keys: Mapping[str, Any], templates: Mapping[str, str]) -> Tokenizer:
    bos, eos = keys.get("bos_token_id"), keys.get("eos_token_id")
    frame(backend, bos if keys.get("add_bos_token") else None, eos if keys.get("add_eos_token") else None)
    marked = (token for token, (name, kind) in enumerate(_tokens(keys)) if name in END_TOKENS and kind != Kind.NORMAL)
    named = (keys[name] for name in ("eot_token_id", "eom_token_id") if name in keys)
    return Tokenizer(
        backend,
        bos_id=bos,
        eos_id=eos,
        unk_id=keys.get("unknown_token_id"),
        pad_id=keys.get("padding_token_id"),
        end_ids=[*named, *marked],
        templates=templates,
    )


def _templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    keys = {"default": "tokenizer.chat_template", "tool_use": "tokenizer.chat_template.tool_use"}
    return {name: metadata[key] for name, key in keys.items() if key in metadata}
