"""Sums of matrix instructions as tensor cores make them: integers exactly, floating point truncated.

The products of a step are exact. With the sum before them they are aligned to the largest, cut off some bits below it,
added exactly, and the result is cut to fp32; how many at a time and how many bits are kept says
:data:`~ditq_kernels.layer.error_budget.MATRIX_UNITS`, with its sources.
"""

from __future__ import annotations

import numpy as np

from ...layer.error_budget import MATRIX_UNITS

SMALLEST_EXPONENT = -100  # below it terms are cut as if the largest had this one


def to_fp32_truncated(value: np.ndarray) -> np.ndarray:
    """fp64 to fp32, towards zero; what is too large becomes infinite."""
    rounded = value.astype(np.float32)
    too_far = np.abs(rounded.astype(np.float64)) > np.abs(value)
    return np.where(too_far & np.isfinite(value), np.nextafter(rounded, np.float32(0)), rounded)


def unit_of(arch: int) -> tuple[int, int]:
    """(products at a time, fraction bits that are kept) of an architecture, 10 * major + minor."""
    return MATRIX_UNITS[arch // 10]


def _step(before: np.ndarray, x: np.ndarray, w: np.ndarray, bits: int) -> np.ndarray:
    """``before`` [b, rows, columns] plus the products of x [b, rows, k] and w [b, columns, k], aligned and cut."""
    # The product of two 16-bit numbers fits fp32; a cut term is an integer below 2**26, and 17 of these fit int32.
    terms = [x[:, :, None, i] * w[:, None, :, i] for i in range(x.shape[2])]
    largest = np.abs(before)
    for term in terms:
        np.maximum(largest, np.abs(term), out=largest)
    if not np.isfinite(largest).all():
        return sum(terms, before)
    _, exponent = np.frexp(largest)  # largest lies in [1/2, 1) * 2**exponent
    shift = bits + 1 - np.maximum(exponent, SMALLEST_EXPONENT)
    units = np.ldexp(np.float32(1), shift)
    total = (before * units).astype(np.int32)
    for term in terms:
        total += (term * units).astype(np.int32)
    return to_fp32_truncated(np.ldexp(total.astype(np.float64), -shift))


def multiply_accumulate(
    before: np.ndarray,
    x: np.ndarray,
    w: np.ndarray,
    kind: str,
    unit: tuple[int, int] | None,
    saturates: bool = False,
) -> np.ndarray:
    """``before`` [b, rows, columns] plus x [b, rows, k] times w [b, columns, k] transposed, both fp32 values; ``kind``
    "f32" or "s32".

    Args:
        unit: of :func:`unit_of`; None rounds fp32 sums as numpy does.
        saturates: of integers.
    """
    if kind == "f32" and unit:
        at_once, bits = unit
        for k in range(0, x.shape[2], at_once):
            before = _step(before, x[:, :, k : k + at_once], w[:, :, k : k + at_once], bits)
        return before
    product = x @ w.transpose(0, 2, 1)
    if kind == "f32":
        return before + product
    if not saturates:
        return before + product.astype(np.int32)
    exact = before.astype(np.int64) + product.astype(np.int64)
    return np.clip(exact, -(2**31), 2**31 - 1).astype(np.int32)
