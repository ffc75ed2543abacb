"""Vocabularies that older models keep instead of a tokenizer.json: SentencePiece's and tiktoken's files."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, normalizers
from tokenizers import Tokenizer as Backend

from kvant.errors import CorruptModelError, MissingDependencyError, UnsupportedModelError
from kvant.text import bpe
from kvant.text.spelling import BYTE_TO_CHAR

QWEN_SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BPE = 2


def read_sentencepiece(path: Path, prefix: bpe.PrefixScheme) -> tuple[Backend, dict[str, str]]:
    """The encoder in a tokenizer.model, and its special tokens by the names of tokenizer_config.json.

    Args:
        path: the file.
        prefix: where a space goes before a text, if the file wants one at all.

    Raises:
        MissingDependencyError: sentencepiece or protobuf is not installed.
        UnsupportedModelError: not byte-pair encoding.
        CorruptModelError: not a SentencePiece model.
    """
    model = _parse(path)
    if model.trainer_spec.model_type != _BPE:
        raise UnsupportedModelError(f"{path}: SentencePiece models are supported where they are of the type BPE")
    pieces = list(model.pieces)
    if not model.normalizer_spec.add_dummy_prefix:
        prefix = "never"
    elif any(piece.type == _USER_DEFINED for piece in pieces):
        prefix = "first"  # no space goes between such a piece and what follows it
    ranked = sorted((piece for piece in pieces if piece.type == _NORMAL), key=lambda piece: -piece.score)
    merges = bpe.all_merges([piece.piece for piece in ranked])
    unk = next((piece.piece for piece in pieces if piece.type == _UNKNOWN), None)
    backend = bpe.sentencepiece({_written(piece): i for i, piece in enumerate(pieces)}, merges, unk, prefix)
    backend.normalizer = normalizers.Sequence([*_cleaning(model.normalizer_spec), backend.normalizer])
    backend.add_tokens([_added(piece) for piece in pieces if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)])
    roles = {name: getattr(model.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk", "pad")}
    return backend, {f"{name}_token": pieces[i].piece for name, i in roles.items() if 0 <= i < len(pieces)}


def read_qwen_tiktoken(path: Path) -> Backend:
    """The encoder of Qwen v1 in a qwen.tiktoken: the ranks of byte strings, and special tokens that follow them.

    Raises:
        CorruptModelError: a line is not "<base64> <rank>", or ranks are missing.
    """
    try:
        ranks = dict(_rank(line) for line in path.read_bytes().splitlines() if line)
    except (ValueError, binascii.Error) as error:
        raise CorruptModelError(f"{path}: a line is not '<base64> <rank>': {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CorruptModelError(f"{path}: the ranks are not those from 0 to {len(ranks) - 1}")
    vocabulary = {_name(token): rank for token, rank in sorted(ranks.items(), key=lambda entry: entry[1])}
    backend = bpe.byte_level(vocabulary, bpe.all_merges(vocabulary), bpe.SPLITTINGS["qwen2"])
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in QWEN_SPECIAL_TOKENS])
    return backend


def _parse(path: Path) -> Any:
    try:
        protocol: Any = import_module("sentencepiece.sentencepiece_model_pb2")
        decode_error: type[Exception] = import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        raise MissingDependencyError(f"reading {path.name} needs: pip install sentencepiece protobuf") from error
    try:
        return protocol.ModelProto.FromString(path.read_bytes())
    except decode_error as error:
        raise CorruptModelError(f"{path} is not a SentencePiece model: {error}") from error


def _written(piece: Any) -> str:
    """A piece's name; those that are found in the text itself are named as they stand there."""
    return str(piece.piece.replace("▁", " ") if piece.type == _USER_DEFINED else piece.piece)


def _added(piece: Any) -> AddedToken:
    return AddedToken(_written(piece), special=piece.type != _USER_DEFINED, normalized=False)


def _cleaning(rules: Any) -> Iterable[Any]:
    if rules.precompiled_charsmap:
        yield normalizers.Precompiled(rules.precompiled_charsmap)
    if rules.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +| +\z"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")


def _rank(line: bytes) -> tuple[bytes, int]:
    token, rank = line.split()
    return base64.b64decode(token, validate=True), int(rank)


def _name(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)
