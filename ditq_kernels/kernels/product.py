"""The matrix product of every scheme: activations (int8, or in their own dtype) times stored weights, decoded in the
loop.

The tile is computed transposed, ``[BLOCK_N, BLOCK_M]``: with the weight as the left operand, Hopper's matrix
instruction takes the decoded weights from registers and they are never written to shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..formats import WeightFormat
from .config import (
    SMALL_M,
    SMALL_STAGES,
    capability,
    choose_small,
    choose_tile,
    columns_per_part,
    launch_device,
    tile_class,
)
from .decode import BLOCK, HALF_BLOCK, load_group_scales, load_halves, matrix_operand_type, part_of_block
from .interpreter import interpreting

TILES_PER_GROUP = tl.constexpr(8)  # tiles of M that share one column of weight tiles before the next is begun


@triton.jit
def load_activations(x_row, k, K, EVEN_K: tl.constexpr):
    """Activations at inputs ``k``, in the shape that ``x_row + k`` has."""
    if EVEN_K:
        return tl.load(x_row + k)
    else:
        return tl.load(x_row + k, mask=k < K, other=0)


@triton.jit
def epilogue(acc, sx, scale, bias, m, n, N, RAW: tl.constexpr, PROMOTED: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Scales and bias on an accumulator whose axes ``m`` and ``n`` index (each shaped to broadcast): fp32, or int32
    untouched if ``RAW``.
    """
    if RAW:
        return acc
    y = acc.to(tl.float32)
    if sx is not None:
        y = y * tl.load(sx + m)
    if not PROMOTED:
        y = y * tl.load(scale + n)
    if HAS_BIAS:
        y = y + tl.load(bias + n).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    x,
    sx,
    qweight,
    scale,
    group_code,
    bias,
    y,
    M,
    N,
    K,
    stride_m,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PROMOTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAW: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPILED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y[m, n] = sx[m] * scale[n] * sum_k x[m, k] * w[n, k] + bias[n]``; ``sx`` is None for activations in their own
    dtype.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    first_m = (tile // (TILES_PER_GROUP * tiles_n)) * TILES_PER_GROUP
    width = tl.minimum(tiles_m - first_m, TILES_PER_GROUP)
    inside = tile % (TILES_PER_GROUP * tiles_n)
    m = (first_m + inside % width) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (inside // width) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the end are read from row 0 and never stored: cheaper than masks in the loop.
    m_read = tl.where(m < M, m, 0)
    n_read = tl.where(n < N, n, 0)

    integer: tl.constexpr = x.dtype.element_ty == tl.int8
    accumulator_type: tl.constexpr = tl.int32 if integer else tl.float32
    operand_type: tl.constexpr = matrix_operand_type(x.dtype.element_ty, COMPILED)
    total_type: tl.constexpr = tl.float32 if PROMOTED else accumulator_type
    x_row = x + m_read.to(tl.int64)[None, :] * stride_m
    part = tl.arange(0, PART)[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_M], total_type)
    for step in range(0, tl.cdiv(K, BLOCK) * (HALF_BLOCK // PART)):
        low, high = load_halves(
            qweight, group_code, n_read, N, K, row_bytes, groups, step, BITS, GROUP, PART, EVEN_K, COMPILED
        )
        _, k = part_of_block(step, PART)
        x_low = load_activations(x_row, k + part, K, EVEN_K)  # [PART, BLOCK_M]
        x_high = load_activations(x_row, k + part + HALF_BLOCK, K, EVEN_K)
        low, high = low.to(operand_type), high.to(operand_type)
        x_low, x_high = x_low.to(operand_type), x_high.to(operand_type)
        if PROMOTED:
            s_low, s_high = load_group_scales(scale, n_read, N, groups, step, GROUP, PART)
            total += (
                tl.dot(low, x_low, out_dtype=accumulator_type, input_precision="ieee").to(tl.float32) * s_low[:, None]
            )
            total += (
                tl.dot(high, x_high, out_dtype=accumulator_type, input_precision="ieee").to(tl.float32)
                * s_high[:, None]
            )
        else:
            total = tl.dot(low, x_low, total, out_dtype=accumulator_type, input_precision="ieee")
            total = tl.dot(high, x_high, total, out_dtype=accumulator_type, input_precision="ieee")
    result = epilogue(total, sx, scale, bias, m_read[None, :], n_read[:, None], N, RAW, PROMOTED, HAS_BIAS)
    inside_y = (m < M)[None, :] & (n < N)[:, None]
    tl.store(y + m.to(tl.int64)[None, :] * N + n[:, None], result.to(y.dtype.element_ty), mask=inside_y)


@triton.jit(do_not_specialize=["M"])
def small_product_kernel(
    x,
    sx,
    qweight,
    scale,
    group_code,
    bias,
    y,
    M,
    N,
    K,
    stride_m,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PROMOTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAW: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPILED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """:func:`product_kernel` for M <= BLOCK_M: reads each weight once, multiplies without matrix instructions, and sums
    over K at the end.
    """
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_read = tl.where(m < M, m, 0)
    n_read = tl.where(n < N, n, 0)
    integer: tl.constexpr = x.dtype.element_ty == tl.int8
    product_type: tl.constexpr = tl.int32 if integer else tl.float32
    total_type: tl.constexpr = tl.float32 if PROMOTED else product_type
    x_row = x + m_read.to(tl.int64)[:, None] * stride_m
    part = tl.arange(0, PART)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N, PART], total_type)
    for step in range(0, tl.cdiv(K, BLOCK) * (HALF_BLOCK // PART)):
        low, high = load_halves(
            qweight, group_code, n_read, N, K, row_bytes, groups, step, BITS, GROUP, PART, EVEN_K, COMPILED
        )
        _, k = part_of_block(step, PART)
        x_low = load_activations(x_row, k + part, K, EVEN_K).to(product_type)  # [BLOCK_M, PART]
        x_high = load_activations(x_row, k + part + HALF_BLOCK, K, EVEN_K).to(product_type)
        y_low = x_low[:, None, :] * low.to(product_type)[None, :, :]
        y_high = x_high[:, None, :] * high.to(product_type)[None, :, :]
        if PROMOTED:
            s_low, s_high = load_group_scales(scale, n_read, N, groups, step, GROUP, PART)
            total += y_low.to(tl.float32) * s_low[None, :, None]
            total += y_high.to(tl.float32) * s_high[None, :, None]
        else:
            total += y_low
            total += y_high
    result = epilogue(tl.sum(total, 2), sx, scale, bias, m_read[:, None], n_read[None, :], N, RAW, PROMOTED, HAS_BIAS)
    inside_y = (m < M)[:, None] & (n < N)[None, :]
    tl.store(y + m.to(tl.int64)[:, None] * N + n[None, :], result.to(y.dtype.element_ty), mask=inside_y)


def specialise(
    x_dtype: torch.dtype,
    out_dtype: torch.dtype,
    fmt: WeightFormat,
    rows: int,
    in_features: int,
    has_bias: bool,
    capability: int,
) -> tuple[triton.JITFunction, dict[str, int | bool], dict[str, int]]:
    """(kernel, its compile-time constants, launch options) for a product of ``rows`` rows on ``capability``."""
    if rows <= SMALL_M:
        kernel, config, stages = small_product_kernel, choose_small(rows), SMALL_STAGES
    else:
        kernel, config = product_kernel, choose_tile(tile_class(rows), x_dtype.itemsize, fmt, capability)
        stages = config.num_stages
    constants = dict(
        BITS=fmt.bits,
        GROUP=fmt.group or 0,
        PROMOTED=fmt.promoted,
        HAS_BIAS=has_bias,
        RAW=out_dtype == torch.int32,
        EVEN_K=in_features % BLOCK.value == 0,
        COMPILED=not interpreting(),
        PART=columns_per_part(fmt),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )
    return kernel, constants, dict(num_warps=config.num_warps, num_stages=stages)


def _launch(
    x: torch.Tensor,
    sx: torch.Tensor | None,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    group_code: torch.Tensor | None,
    bias: torch.Tensor | None,
    fmt: WeightFormat,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    rows, in_features = x.shape
    out_features = qweight.shape[0]
    y = torch.empty((rows, out_features), dtype=out_dtype, device=x.device)
    if not y.numel():
        return y
    x = x if x.stride(1) == 1 or in_features == 1 else x.contiguous()
    kernel, constants, options = specialise(
        x.dtype, out_dtype, fmt, rows, in_features, bias is not None, capability(x.device)
    )
    grid = (triton.cdiv(rows, constants["BLOCK_M"]) * triton.cdiv(out_features, constants["BLOCK_N"]),)
    with launch_device(x):
        kernel[grid](
            x,
            sx,
            qweight,
            scale,
            group_code,
            bias,
            y,
            rows,
            out_features,
            in_features,
            x.stride(0),
            qweight.stride(0),
            fmt.group_count(in_features),
            **constants,
            **options,
        )
    return y


def linear_a8(
    qx: torch.Tensor,
    sx: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    group_code: torch.Tensor | None,
    bias: torch.Tensor | None,
    fmt: WeightFormat,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`ditq_kernels.reference.linear_a8`."""
    return _launch(qx, sx.contiguous(), qweight, scale, group_code, bias, fmt, out_dtype)


def linear_a16(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    group_code: torch.Tensor | None,
    bias: torch.Tensor | None,
    fmt: WeightFormat,
) -> torch.Tensor:
    """See :func:`ditq_kernels.reference.linear_a16`; sums in fp32 over activations in their own dtype."""
    return _launch(x, None, qweight, scale, group_code, bias, fmt, x.dtype)
