"""Tokenizers to test with: SmolLM2's own, and small ones made on the spot."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvant.text.gguf import tokenizer_from_gguf
from kvant.text.spelling import BYTE_TO_CHAR
from kvant.text.tokenizer import Tokenizer
from kvant.weights.sources.gguf import GgufSource

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the dog does not care.",
    "def fold(items):\n    total = 0\n    for item in items:\n        total += item\n    return total",
    "Numbers 1234567890 and signs ==== ---- !!  with  double  spaces    and four.",
    "Grüße aus Köln, naïve café, 你好世界, привет мир.",
)


@pytest.fixture(scope="session")
def metadata(smollm2: Path) -> dict[str, Any]:
    return GgufSource(smollm2).metadata


@pytest.fixture(scope="session")
def smollm2_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(metadata)


@pytest.fixture(scope="session")
def byte_keys() -> Callable[..., dict[str, Any]]:
    """The keys of a byte-level GGUF tokenizer: 256 bytes, a few merges and two control tokens."""

    def keys(**changes: Any) -> dict[str, Any]:
        merges = ["h e", "l l", "he ll", "hell o", "Ġ w"]
        tokens = [BYTE_TO_CHAR[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in merges]
        names = [*tokens, "<|begin|>", "<|im_end|>", "<think>"]
        values = {
            "model": "gpt2",
            "pre": "gpt-2",
            "tokens": names,
            "token_type": [1] * len(tokens) + [3, 3, 4],
            "merges": merges,
            "bos_token_id": len(tokens),
            "eos_token_id": len(tokens) + 1,
        }
        return {f"tokenizer.ggml.{name}": value for name, value in (values | changes).items() if value is not None}

    return keys


@pytest.fixture(scope="session")
def train_sentencepiece() -> Callable[..., bytes]:
    """A SentencePiece BPE model of a few hundred pieces with byte fallback, set up as Llama's."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer

    def train(**options: Any) -> bytes:
        model = io.BytesIO()
        usual = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 460, "normalization_rule_name": "identity"}
        llama = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True}
        trainer.train(sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, **(usual | llama | options))
        return model.getvalue()

    return train


@pytest.fixture(scope="session")
def sentencepiece_keys() -> Callable[[bytes], dict[str, Any]]:
    """What a GGUF file says of a SentencePiece model."""

    def keys(model: bytes) -> dict[str, Any]:
        from sentencepiece import sentencepiece_model_pb2

        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
            "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
            "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
            "tokenizer.ggml.add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        }

    return keys
