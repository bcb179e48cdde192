"""Activations to int8 codes and one fp32 scale per row, per token or by a calibrated reach, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import MAX_ACTIVATION_BLOCK, launch_device

# reference.SMALLEST_AMAX; a test holds the two together.
SMALLEST_AMAX = tl.constexpr(2.0**-100)
# Adding and subtracting 1.5 * 2**23 rounds a small fp32 number to an integer, ties to even, without a library call.
ROUNDING_OFFSET = tl.constexpr(12582912.0)


@triton.jit(do_not_specialize=["M"])
def quantize_activation_kernel(
    x, amax, codes, scales, M, K, stride_m, stride_k, HAS_AMAX: tl.constexpr, BLOCK_K: tl.constexpr
):
    """One program a row. The second loop reads the row again, from the cache."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    largest = tl.zeros([BLOCK_K], tl.float32)
    broken = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + columns
        value = tl.abs(tl.load(x + row * stride_m + k.to(tl.int64) * stride_k, mask=k < K, other=0).to(tl.float32))
        finite = value < float("inf")  # false for NaN too, which max() would drop
        largest = tl.maximum(largest, tl.where(finite, value, 0.0))
        broken = tl.maximum(broken, tl.where(finite, 0, 1))
    row_is_finite = tl.max(broken) == 0
    reach = tl.load(amax).to(tl.float32) if HAS_AMAX else tl.max(largest)
    reach = tl.maximum(reach, SMALLEST_AMAX)
    factor = tl.div_rn(127.0, reach)
    for start in range(0, K, BLOCK_K):
        k = start + columns
        value = tl.load(x + row * stride_m + k.to(tl.int64) * stride_k, mask=k < K, other=0).to(tl.float32)
        # Clamped before rounding: the bounds are integers, so the order does not matter, and the offset trick needs
        # small numbers.
        scaled = tl.minimum(tl.maximum(value * factor, -127.0), 127.0)
        rounded = (scaled + ROUNDING_OFFSET) - ROUNDING_OFFSET
        tl.store(codes + row * K + k, tl.where(row_is_finite, rounded, 0.0).to(tl.int8), mask=k < K)
    tl.store(scales + row, tl.where(row_is_finite, tl.div_rn(reach, 127.0), float("nan")))


def specialise(columns: int, has_amax: bool) -> tuple[dict[str, int | bool], dict[str, int | bool]]:
    """(compile-time constants, launch options) for rows of ``columns``."""
    block = min(triton.next_power_of_2(max(columns, 1)), MAX_ACTIVATION_BLOCK)
    # A fused multiply-add would round once where the definition rounds twice.
    return dict(HAS_AMAX=has_amax, BLOCK_K=block), dict(num_warps=4 if block <= 4096 else 8, enable_fp_fusion=False)


def quantize_activation(x: torch.Tensor, amax: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ditq_kernels.reference.quantize_activation`; any strides."""
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        constants, options = specialise(columns, amax is not None)
        with launch_device(x):
            quantize_activation_kernel[(rows,)](
                x,
                amax,
                codes,
                scales,
                rows,
                columns,
                x.stride(0),
                x.stride(1),
                **constants,
                **options,
            )
    return codes, scales
