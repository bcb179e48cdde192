"""The gradient of the input, on the packed weight: ``grad_x = grad_y @ W`` with W decoded tile by tile, never dense;
of fp32 gradients stretch by stretch.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..layer.formats import WeightFormat
from ..layer.packed_weight import PackedWeight
from .config import GRADIENT_TILE, cdiv, columns_per_part
from .decode import (
    BLOCK,
    HALF_BLOCK,
    between_halves,
    load_group_parameters,
    load_halves_as,
    matrix_operand_type,
    part_of_block,
)
from .device import launch_device
from .expansion import expanded_gradient
from .interpreter import interpreting
from .launch import launch


@triton.jit(do_not_specialize=["M"])
def grad_input_kernel(
    grad,
    qweight,
    scale,
    group_code,
    grad_x,
    M,
    N,
    K,
    stride_m,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PROMOTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPILED: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M rows of one part of a block, both halves. The reduction runs over the outputs."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    step = tl.program_id(1)
    _, k = part_of_block(step, BITS, PART)
    grad_row = grad + tl.where(m < M, m, 0).to(tl.int64)[:, None] * stride_m
    operand_type: tl.constexpr = matrix_operand_type(grad.dtype.element_ty, COMPILED)
    total_low = tl.zeros([BLOCK_M, PART], tl.float32)
    total_high = tl.zeros([BLOCK_M, PART], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < N
        n_read = tl.where(inside, n, 0)
        p_low, p_high = load_group_parameters(scale, group_code, n_read, N, groups, step, BITS, GROUP, PROMOTED, PART)
        stored = qweight, n_read, K, row_bytes, step, p_low, p_high
        low, high = load_halves_as(*stored, BITS, PART, EVEN_K, COMPILED, tl.float32)
        if PROMOTED:
            s_low, s_high = p_low, p_high
        else:
            s_low = tl.load(scale + n_read)
            s_high = s_low
        g = tl.load(grad_row + n_read[None, :], mask=inside[None, :], other=0)  # [BLOCK_M, BLOCK_N]
        w_low = (low * s_low[:, None]).to(g.dtype).to(operand_type)
        w_high = (high * s_high[:, None]).to(g.dtype).to(operand_type)
        g = g.to(operand_type)
        total_low = tl.dot(g, w_low, total_low)
        total_high = tl.dot(g, w_high, total_high)
    columns = (k + tl.arange(0, PART))[None, :]
    row = grad_x + m.to(tl.int64)[:, None] * K
    rows_inside = (m < M)[:, None]
    tl.store(row + columns, total_low.to(grad_x.dtype.element_ty), mask=rows_inside & (columns < K))
    columns += between_halves(BITS, PART)
    tl.store(row + columns, total_high.to(grad_x.dtype.element_ty), mask=rows_inside & (columns < K))


@functools.cache
def specialise(fmt: WeightFormat, even: bool) -> tuple[dict[str, int | bool], dict[str, int]]:
    """(compile-time constants, launch options) of :func:`grad_input_kernel`; ``even``: whether K is whole blocks."""
    constants = dict(
        BITS=fmt.bits,
        GROUP=fmt.group or 0,
        PROMOTED=fmt.promoted,
        EVEN_K=even,
        COMPILED=not interpreting(),
        PART=columns_per_part(fmt),
        BLOCK_M=GRADIENT_TILE.block_m,
        BLOCK_N=GRADIENT_TILE.block_n,
    )
    return constants, dict(num_warps=GRADIENT_TILE.num_warps, num_stages=GRADIENT_TILE.num_stages)


def grad_input(grad: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """See :func:`ditq_kernels.layer.reference.grad_input`; weights are rounded to the gradient's dtype, sums are
    fp32.
    """
    rows, out_features = grad.shape
    qweight, scale, group_code, fmt, in_features = weight
    grad_x = torch.empty((rows, in_features), dtype=grad.dtype, device=grad.device)
    if not grad_x.numel():
        return grad_x
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    if grad.dtype == torch.float32:
        with launch_device(grad):
            return expanded_gradient(grad, weight, grad_x)
    constants, options = specialise(fmt, in_features % BLOCK.value == 0)
    parts = HALF_BLOCK.value // constants["PART"]
    grid = (cdiv(rows, constants["BLOCK_M"]), cdiv(in_features, BLOCK.value) * parts)
    with launch_device(grad):
        launch(
            grad_input_kernel,
            grid,
            (
                grad,
                qweight,
                scale,
                group_code,
                grad_x,
                rows,
                out_features,
                in_features,
                grad.stride(0),
                qweight.stride(0),
                fmt.group_count(in_features),
            ),
            constants,
            options,
        )
    return grad_x
