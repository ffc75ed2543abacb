"""Texts that a model reads to be measured, cut into windows of tokens."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from kvant.errors import ConfigError
from kvant.text.tokenizer import Tokenizer

Window = tuple[int, ...]


def calibration_text() -> str:
    """The bundled text that models are measured on: State of the Union addresses, in the public domain."""
    return resources.files("kvant.quantize").joinpath("data", "calibration.txt").read_text(encoding="utf-8")


def read_text_file(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the text {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text {path} is not UTF-8 (byte {error.start}); convert it, or give another") from error


def cut_windows(text: str, tokenizer: Tokenizer, count: int, size: int) -> tuple[Window, ...]:
    """The first `count` windows of `size` tokens, one after the other without overlap.

    Each window begins with what the tokenizer puts before a text (BOS, for those that do), counted in `size`.

    Raises:
        ConfigError: the text is too short, or such windows have no room for it.
    """
    opening = _opening(tokenizer)
    step = size - len(opening)
    if step < 1:
        raise ConfigError(f"window_size={size} has no room for text after the tokens that begin every text")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < count * step:
        raise ConfigError(
            f"the text has {len(ids):,} tokens, enough for {len(ids) // step} windows of {size}, not for {count}; ask "
            "for fewer or smaller windows, or give a longer text"
        )
    return tuple((*opening, *ids[start : start + step]) for start in range(0, count * step, step))


def _opening(tokenizer: Tokenizer) -> Window:
    """The special tokens that the tokenizer puts before a text; those that it puts after one are left out."""
    bare, framed = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    starts = range(len(framed) - len(bare) + 1)
    return tuple(framed[: next(start for start in starts if framed[start : start + len(bare)] == bare)])
