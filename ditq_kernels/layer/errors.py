"""The one exception of our own."""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """A combination of op, format, device and backend that does not exist; the message names it and what would work."""
