"""The tokenizer in the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from kvant.errors import CorruptModelError, UnsupportedModelError
from kvant.text import bpe
from kvant.text.tokenizer import Tokenizer, frame

_PREFIX = "tokenizer.ggml."

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
"""Files name one token as the end of a text. Chat models end a turn with one of these, too."""

_SPM_DEFAULTS: Final[Mapping[str, Any]] = MappingProxyType(
    {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True}
)


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    It encodes as llama.cpp does, and composes characters (NFC) where the model's own tokenizer does, too.

    Args:
        metadata: the file's keys and values as plain Python.

    Raises:
        UnsupportedModelError: a kind of tokenizer or of splitting that kvant does not know.
        CorruptModelError: keys are missing, of another type than they should be, or do not fit together.
    """
    try:
        return _build(metadata)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptModelError(f"the tokenizer in the GGUF file is malformed: {error!r}") from error


def _build(metadata: Mapping[str, Any]) -> Tokenizer:
    keys = {key.removeprefix(_PREFIX): value for key, value in metadata.items() if key.startswith(_PREFIX)}
    match keys.get("model"):
        case "gpt2":
            backend, usual = _byte_level(keys)
        case "llama":
            backend, usual = _sentencepiece(keys)
        case other:
            raise UnsupportedModelError(f"GGUF tokenizer {other!r} is not supported; kvant reads 'gpt2' and 'llama'")
    phi3 = keys["model"] == "llama" and metadata.get("general.architecture") == "phi3"
    backend.add_tokens([_added(name, kind, phi3) for name, kind in _tokens(keys) if name and kind in bpe.STAND_ALONE])
    return _with_special_tokens(backend, {**usual, **keys}, _templates(metadata))


def _byte_level(keys: Mapping[str, Any]) -> tuple[Backend, Mapping[str, Any]]:
    """The encoder, and the values of keys that may be missing."""
    pre = keys.get("pre", "default")
    splitting = bpe.SPLITTINGS.get(pre)
    if splitting is None:
        known = ", ".join(bpe.SPLITTINGS)
        raise UnsupportedModelError(f"GGUF pre-tokenizer {pre!r} is not supported; kvant knows {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in _list(keys, "merges")]
    return bpe.byte_level(_list(keys, "tokens"), merges, splitting), {"add_bos_token": splitting.adds_bos}


def _sentencepiece(keys: Mapping[str, Any]) -> tuple[Backend, Mapping[str, Any]]:
    """The encoder, and the values of keys that may be missing."""
    scores, tokens = _list(keys, "scores"), _tokens(keys)
    if len(scores) != len(tokens):
        raise CorruptModelError(f"{len(tokens)} tokens but {len(scores)} scores in the tokenizer")
    pieces = [bpe.Piece(name, score, kind) for (name, kind), score in zip(tokens, scores, strict=True)]
    return bpe.sentencepiece(pieces, "always" if keys.get("add_space_prefix", True) else "never"), _SPM_DEFAULTS


def _list(keys: Mapping[str, Any], name: str) -> list[Any]:
    value = keys.get(name)
    if not isinstance(value, list):
        raise CorruptModelError(f"the GGUF file has no list {_PREFIX}{name}")
    return value


def _tokens(keys: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The name and kind of each token."""
    names = _list(keys, "tokens")
    kinds = keys.get("token_type") or [bpe.Kind.NORMAL] * len(names)
    if len(kinds) != len(names):
        raise CorruptModelError(f"{len(names)} tokens but {len(kinds)} token types in the tokenizer")
    return list(zip(names, kinds, strict=True))


def _added(name: str, kind: int, phi3: bool) -> AddedToken:
    # Phi-3's marks take the white space after them; no key of the file says so.
    takes_space = phi3 and name not in ("<unk>", "<s>", "<|endoftext|>")
    special = kind != bpe.Kind.USER_DEFINED or name in END_TOKENS
    return AddedToken(name, special=special, normalized=False, rstrip=takes_space)


def _with_special_tokens(backend: Backend, keys: Mapping[str, Any], templates: Mapping[str, str]) -> Tokenizer:
    bos, eos = keys.get("bos_token_id"), keys.get("eos_token_id")
    frame(backend, bos if keys.get("add_bos_token") else None, eos if keys.get("add_eos_token") else None)
    marked = [i for i, (name, kind) in enumerate(_tokens(keys)) if name in END_TOKENS and kind in bpe.STAND_ALONE]
    named = [keys[name] for name in ("eot_token_id", "eom_token_id") if name in keys]
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
    return {name: metadata[key] for name, key in keys.items() if isinstance(metadata.get(key), str)}
