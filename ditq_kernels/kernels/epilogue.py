"""What happens between an accumulator and the output: one function, in fp32, for every product.

Whatever is to be fused behind a product (an activation function, a gate, a residual) is one more step here: it sees the
fp32 value, and the indices of its row and output.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def epilogue(acc, sx, scale, bias, m, n, RAW: tl.constexpr):
    """fp32 values of an accumulator whose axes ``m`` and ``n`` index (each shaped to broadcast), or int32 untouched if
    ``RAW``. Absent parts are None: ``sx`` of activations in their own dtype, ``scale`` of weights that are scaled
    already.
    """
    if RAW:
        return acc
    else:  # in a branch of its own: the compiler wants one type of all it reaches, and reaches what follows a return
        y = acc.to(tl.float32)
        if sx is not None:
            y = y * tl.load(sx + m)
        if scale is not None:
            y = y * tl.load(scale + n)
        if bias is not None:
            y = y + tl.load(bias + n).to(tl.float32)
        return y


@triton.jit
def gated(value, y, residual, stride_residual, gate, stride_gate, rows_per_gate, m, n, M, N):
    """``residual + gate * value``, in fp32, of a ``value`` that is rounded to the dtype of ``y`` first, as it would be
    between two passes; ``m`` and ``n`` as in :func:`epilogue`, with ``rows_per_gate`` rows to a row of ``gate``.
    """
    inside = (m < M) & (n < N)
    value = value.to(y.dtype.element_ty).to(tl.float32)
    of_sample = gate + (m // rows_per_gate).to(tl.int64) * stride_gate + n
    factor = tl.load(of_sample, mask=inside, other=0).to(tl.float32)
    before = tl.load(residual + m.to(tl.int64) * stride_residual + n, mask=inside, other=0).to(tl.float32)
    return before + factor * value


@triton.jit
def store_tile(y, stride_y, value, m, n, M, N):
    """The part of a tile that lies inside ``y``, in the output's dtype; ``m`` and ``n`` as in :func:`epilogue`."""
    tl.store(y + m.to(tl.int64) * stride_y + n, value.to(y.dtype.element_ty), mask=(m < M) & (n < N))
