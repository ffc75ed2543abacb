"""The tokenizer that comes with a checkpoint."""

from __future__ import annotations

from kvant.text.directory import load_tokenizer
from kvant.text.gguf import tokenizer_from_gguf
from kvant.text.tokenizer import Tokenizer
from kvant.weights.source import TensorSource


def read_tokenizer(source: TensorSource) -> Tokenizer:
    """From a GGUF's metadata, or from the files of an HF directory."""
    return tokenizer_from_gguf(source.metadata) if source.metadata else load_tokenizer(source.path)
