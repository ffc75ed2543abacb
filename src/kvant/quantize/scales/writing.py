"""Writing a file so that nobody ever sees half of it."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from kvant.errors import ConfigError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file at once, over one that is there; its directory is made where it is missing.

    Raises:
        ConfigError: it cannot be written; nothing has changed then.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}; make room there, or choose another place") from error
