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
from kvant.text.bpe import Kind
from kvant.text.spelling import BYTE_TO_CHAR

QWEN_SPECIAL_TOKENS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))

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
    pieces = [_piece(entry) for entry in model.pieces]
    if not model.normalizer_spec.add_dummy_prefix:
        prefix = "never"
    elif any(piece.kind == Kind.USER_DEFINED for piece in pieces):
        prefix = "first"  # no space goes between such a piece and what follows it
    backend = bpe.sentencepiece(pieces, prefix)
    backend.normalizer = normalizers.Sequence([*_cleaning(model.normalizer_spec), backend.normalizer])
    alone = [piece for piece in pieces if piece.kind in bpe.STAND_ALONE]
    backend.add_tokens([AddedToken(p.name, special=p.kind != Kind.USER_DEFINED, normalized=False) for p in alone])
    ids = {role: getattr(model.trainer_spec, f"{role}_id") for role in ("bos", "eos", "unk", "pad")}
    return backend, {f"{role}_token": pieces[i].name for role, i in ids.items() if 0 <= i < len(pieces)}


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
    names = [_name(token) for token, _ in sorted(ranks.items(), key=lambda entry: entry[1])]
    backend = bpe.byte_level(names, bpe.all_merges(names), bpe.SPLITTINGS["qwen2"])
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


def _piece(entry: Any) -> bpe.Piece:
    """User-defined pieces are named as they stand in a text."""
    name = entry.piece.replace("▁", " ") if entry.type == Kind.USER_DEFINED else entry.piece
    return bpe.Piece(name, entry.score, entry.type)


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
