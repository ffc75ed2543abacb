"""The version, where every part of kvant can see it."""

__version__ = "0.1.0"
