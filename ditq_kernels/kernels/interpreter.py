"""Whether kernels run in Triton's interpreter: fixed when the first kernel is defined, so it is read then and not
later.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETING: bool = triton.knobs.runtime.interpret


def interpreting() -> bool:
    """True if the kernels of this process were defined for the interpreter (``TRITON_INTERPRET=1``)."""
    return _INTERPRETING


def _round_to_bfloat16() -> None:
    """Make the interpreter round fp32 to bf16 to nearest, ties to even, as a GPU does: Triton's own cuts off the lower
    half, which costs a bit of every result and hides what the kernels' rounding is.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = src.data.view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return TensorHandle(np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl


if _INTERPRETING:
    _round_to_bfloat16()
