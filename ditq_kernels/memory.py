"""Freed memory back to the system, and how much of it there is."""

from __future__ import annotations

import ctypes
import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path


@functools.cache
def _trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # only the GNU C library has it
        return lambda _: 0


def return_freed() -> None:
    """Give back what the C library keeps of freed memory. It keeps the holes between what lives on, and quantizing one
    layer after the other leaves one for each: without this, half a gigabyte for a model of a billion parameters.
    """
    _trim()(0)


def available_bytes() -> int | None:
    """Memory that the system can give without writing other programs' to disk; None where it does not say."""
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return None


class MemoryWarning(UserWarning):
    """Something may take more memory than there is."""


def warn_of_shortage(wanted: int, what: str, way_out: str, stacklevel: int) -> None:
    """Warn if ``what``, which may take ``wanted`` bytes, does not fit, with the ``way_out``."""
    available = available_bytes()
    if available is not None and wanted > available:
        warnings.warn(
            f"{what} up to {wanted / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory are free: {way_out}",
            MemoryWarning,
            stacklevel=stacklevel + 1,
        )
