"""SiLU on activations as they are loaded: the modulation layers of a DiT take ``silu(embedding)``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def silu(x):
    """``x / (1 + exp(-x))`` in fp32, rounded to ``x``'s dtype, as a separate SiLU would leave it."""
    value = x.to(tl.float32)
    return (value / (1.0 + tl.exp(-value))).to(x.dtype)
