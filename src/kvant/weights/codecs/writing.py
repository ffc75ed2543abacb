"""The formats that quantized checkpoints are written in, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from kvant.errors import ConfigError
from kvant.weights.codecs.awq import AwqWriter
from kvant.weights.codecs.compressed_tensors import CompressedTensorsWriter
from kvant.weights.codecs.gptq import GptqWriter
from kvant.weights.codecs.layout import Layout, Writer

__all__ = ["FORMATS", "Layout", "Writer", "writer"]

FORMATS: Mapping[str, Callable[[], Writer]] = MappingProxyType(
    {"compressed-tensors": CompressedTensorsWriter, "awq": AwqWriter, "gptq": GptqWriter}
)


def writer(format: str) -> Writer:  # noqa: A002 - what users call it
    """The writer of that name.

    Raises:
        ConfigError: there is none.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown checkpoint format {format!r}; known: {', '.join(FORMATS)}")
    return FORMATS[format]()
