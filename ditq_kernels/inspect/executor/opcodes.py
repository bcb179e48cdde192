"""The table of opcodes, complete: each module adds its own."""

from __future__ import annotations

from . import bits, conversions, copies, floats, integers, matrices, memory_access, threads, wgmma
from .operands import BUILDERS

__all__ = [
    "BUILDERS",
    "bits",
    "conversions",
    "copies",
    "floats",
    "integers",
    "matrices",
    "memory_access",
    "threads",
    "wgmma",
]
