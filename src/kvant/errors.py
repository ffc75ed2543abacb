"""Every error kvant raises on purpose; each message names the cause and the remedy."""

from __future__ import annotations

from collections.abc import Iterable


class KvantError(Exception):
    """The root: catch this to catch everything kvant raises on purpose."""


class ConfigError(KvantError, ValueError):
    """A setting is out of range, unknown, or contradicts another."""


class ModelNotFoundError(KvantError):
    """The model name leads to no file, directory or reachable hub repository."""


class UnsupportedModelError(KvantError):
    """The checkpoint is whole, but its architecture, format or option is not one kvant runs."""


class CorruptModelError(KvantError):
    """The checkpoint contradicts itself: missing tensors, wrong shapes, sizes beyond the file."""


class RequestError(KvantError, ValueError):
    """A request cannot be served as asked: empty or too long a prompt, an unknown token id."""


class MemoryFitError(KvantError):
    """The KV cache asked for does not fit the memory there is."""


class NotFiniteError(KvantError, ArithmeticError):
    """A model's keys or values hold infinity or NaN, which no cache can store in few bits.

    Attributes:
        tokens: which of the step's tokens they belong to.
    """

    def __init__(self, message: str, tokens: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.tokens = tuple(tokens)


class EngineDeadError(KvantError):
    """The engine has stopped, by `close()` or by a fault, and takes no more requests."""


class NativeLibraryError(KvantError):
    """The native CPU kernels are not here, or are not those of this version of kvant."""


class MissingDependencyError(KvantError):
    """An optional package that this feature needs is not installed."""
