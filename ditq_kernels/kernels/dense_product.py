"""The matrix product of activations with weights that need no decoding: int8 as stored, or int8 or 16-bit as
:mod:`.expansion` wrote them.

With tensor descriptors the grid is persistent: each program computes tile after tile, and loads the next one's operands
while it stores the last. With pointers there is one program a tile.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..layer.gated_residual import GatedResidual
from .config import OVERLAPPED_ROUTES, Config, by_pointers, cdiv
from .decode import matrix_operand_type
from .epilogue import epilogue, gated, store_tile
from .interpreter import interpreting
from .launch import launch
from .tile_order import tile_position

DESCRIPTOR_ALIGNMENT = 16  # bytes, of the first element


@triton.jit
def _load_operand(
    operand,
    stride,
    first,
    k,
    limit,
    K,
    DESCRIPTORS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[ROWS, BLOCK_K] of ``operand`` from row ``first`` and input ``k``; zeros past K, anything past ``limit`` rows."""
    if DESCRIPTORS:
        return operand.load([first, k])
    else:
        rows = first + tl.arange(0, ROWS)
        # Rows past the end are read from row 0 and never stored: cheaper than masks in the loop.
        row = operand + tl.where(rows < limit, rows, 0).to(tl.int64)[:, None] * stride
        columns = (k + tl.arange(0, BLOCK_K))[None, :]
        if EVEN_K:
            return tl.load(row + columns)
        else:
            return tl.load(row + columns, mask=columns < K, other=0)


@triton.jit(do_not_specialize=["M", "rows_per_gate"])
def dense_product_kernel(
    x,
    w,
    sx,
    scale,
    bias,
    residual,
    gate,
    y,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_y,
    stride_residual,
    stride_gate,
    rows_per_gate,
    RAW: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``y[m, n] = sx[m] * scale[n] * sum_k x[m, k] * w[n, k] + bias[n]``, and ``residual`` added to it times ``gate``;
    absent parts None; ``x`` and ``w`` are pointers or descriptors of blocks.
    """
    operand_type: tl.constexpr = matrix_operand_type(x.dtype if DESCRIPTORS else x.dtype.element_ty, COMPILED)
    accumulator_type: tl.constexpr = tl.int32 if operand_type == tl.int8 else tl.float32
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=DESCRIPTORS):
        first_m, first_n = tile_position(tile, M, N, BLOCK_M, BLOCK_N)
        total = tl.zeros([BLOCK_M, BLOCK_N], accumulator_type)
        for k in range(0, K, BLOCK_K):
            a = _load_operand(x, stride_x, first_m, k, M, K, DESCRIPTORS, EVEN_K, BLOCK_M, BLOCK_K)
            b = _load_operand(w, stride_w, first_n, k, N, K, DESCRIPTORS, EVEN_K, BLOCK_N, BLOCK_K)
            total = tl.dot(a.to(operand_type), b.to(operand_type).T, total, out_dtype=accumulator_type)
        m = (first_m + tl.arange(0, BLOCK_M))[:, None]
        n = (first_n + tl.arange(0, BLOCK_N))[None, :]
        value = epilogue(total, sx, scale, bias, tl.where(m < M, m, 0), tl.where(n < N, n, 0), RAW)
        if residual is not None:
            value = gated(value, y, residual, stride_residual, gate, stride_gate, rows_per_gate, m, n, M, N)
        store_tile(y, stride_y, value, m, n, M, N)


@functools.cache
def specialise(config: Config, out_dtype: torch.dtype, even: bool) -> tuple[dict[str, int | bool], dict[str, int]]:
    """(compile-time constants, launch options) of :func:`dense_product_kernel`; ``even``: whether K is whole steps."""
    constants = dict(
        RAW=out_dtype == torch.int32,
        EVEN_K=even,
        DESCRIPTORS=config.descriptors,
        COMPILED=not interpreting(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )
    # Each operation of the epilogue rounds once, as in the reference: no fused multiply-add.
    return constants, dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=False)


def takes_descriptors(x: torch.Tensor) -> bool:
    """Whether the copy engine can read the matrix: its first element and its rows begin at multiples of 16 bytes."""
    return x.data_ptr() % DESCRIPTOR_ALIGNMENT == 0 and x.stride(0) * x.element_size() % DESCRIPTOR_ALIGNMENT == 0


def dense_product(
    x: torch.Tensor,
    w: torch.Tensor,
    sx: torch.Tensor | None,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    config: Config,
    multiprocessors: int,
    added: GatedResidual | None = None,
) -> None:
    """Writes ``y`` [M, N], whose rows may be strided: ``x`` [M, K] times ``w`` [N, K] transposed, both int8 or both
    16-bit, scaled and biased as far as given; ``added``: what it is added to. Operands that descriptors cannot read are
    read by pointers.
    """
    if config.descriptors and not (takes_descriptors(x) and takes_descriptors(w)):
        config = by_pointers(config)
    if config.route in OVERLAPPED_ROUTES:
        from .overlapped_product import overlapped_product  # Gluon is experimental: who does not use it needs none

        return overlapped_product(x, w, sx, scale, bias, y, config, multiprocessors, added)
    rows, in_features = x.shape
    out_features = w.shape[0]
    tiles = cdiv(rows, config.block_m) * cdiv(out_features, config.block_n)
    left, right, programs = x, w, tiles
    if config.descriptors:
        left = TensorDescriptor(x, [rows, in_features], [x.stride(0), 1], [config.block_m, config.block_k])
        right = TensorDescriptor(w, [out_features, in_features], [w.stride(0), 1], [config.block_n, config.block_k])
        programs = min(tiles, multiprocessors)
    constants, options = specialise(config, y.dtype, in_features % config.block_k == 0)
    launch(
        dense_product_kernel,
        (programs,),
        (
            left,
            right,
            sx,
            scale,
            bias,
            None if added is None else added.residual,
            None if added is None else added.gate,
            y,
            rows,
            out_features,
            in_features,
            x.stride(0),
            w.stride(0),
            y.stride(0),
            0 if added is None else added.residual.stride(0),
            0 if added is None else added.gate.stride(0),
            1 if added is None else added.rows_per_gate,
        ),
        constants,
        options,
    )
