"""The text that a model is evaluated on, cut into windows of tokens."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from kvant.errors import ConfigError
from kvant.quantize.texts import read_text_file

BUNDLED_TEXT = "bundled: State of the Union addresses of 2004 and 2006"


def read_text(path: Path | None) -> str:
    """The text of a UTF-8 file, or without one the bundled text, which nothing in kvant is calibrated on.

    The bundled text is a work of the United States government, in the public domain.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path is None:
        return resources.files("kvant.evaluate").joinpath("data", "evaluation.txt").read_text(encoding="utf-8")
    return read_text_file(path)


def check_windows(count: int, size: int, max_position: int) -> None:
    """Raises ConfigError unless a model of this longest context can be evaluated on such windows."""
    if count < 1:
        raise ConfigError(f"windows={count} must be at least 1")
    if not 2 <= size <= max_position:
        raise ConfigError(f"window_size={size} must be from 2 to {max_position} tokens, this model's longest context")
