"""The matrix product that decodes its weights in the loop: int8 or 16-bit activations of any number of rows, weights of
every format.

The tile is computed transposed, ``[BLOCK_N, BLOCK_M]``: with the weight as the left operand, Hopper's matrix
instruction takes the decoded weights from registers and they are never written to shared memory.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..layer.formats import WeightFormat
from .config import WARPGROUP_FAMILIES, Config, cdiv, columns_per_part, family
from .decode import (
    BLOCK,
    HALF_BLOCK,
    between_halves,
    float_unit,
    load_group_parameters,
    load_halves,
    load_halves_as,
    matrix_operand_type,
    part_of_block,
)
from .device import describe
from .epilogue import epilogue, gated, store_tile
from .interpreter import interpreting
from .launch import launch
from .operands import Operands
from .silu import silu
from .tile_order import tile_position

# Of a thread, for 4-bit weights beside 16-bit activations: left to itself, ptxas takes 128 and spills two on sm_120;
# allowed 168, it takes 116.
MOST_REGISTERS = 168


@triton.jit
def _load_activations(pointer, k, K, SILU: tl.constexpr, EVEN_K: tl.constexpr):
    """Activations at inputs ``k``, which ``pointer`` points to, in its shape."""
    x = tl.load(pointer) if EVEN_K else tl.load(pointer, mask=k < K, other=0)
    return silu(x) if SILU else x


@triton.jit
def _awaited(total):
    """fp32 ``total``, through an instruction that is none. On Hopper, Triton leaves the last product of a turn on its
    way into the next turn, which overwrites the registers that it takes the weights from; a use of its sum makes it
    wait. (Products of int8 are waited for anyway.)
    """
    return tl.inline_asm_elementwise("", "=f,0", [total], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit(do_not_specialize=["M", "rows_per_gate"])
def in_loop_product_kernel(
    x,
    sx,
    qweight,
    scale,
    group_code,
    bias,
    residual,
    gate,
    y,
    M,
    N,
    K,
    stride_x,
    row_bytes,
    groups,
    stride_residual,
    stride_gate,
    rows_per_gate,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PROMOTED: tl.constexpr,
    RAW: tl.constexpr,
    SILU: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPILED: tl.constexpr,
    PART: tl.constexpr,
    AT_ONCE: tl.constexpr,
    AWAITED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y[m, n] = sx[m] * scale[n] * sum_k x[m, k] * w[n, k] + bias[n]``, and ``residual`` added to it times ``gate``;
    one program a tile.
    """
    first_m, first_n = tile_position(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    # Rows past the end are read from row 0 and never stored: cheaper than masks in the loop.
    m_read = tl.where(m < M, m, 0)
    n_read = tl.where(n < N, n, 0)

    integer: tl.constexpr = x.dtype.element_ty == tl.int8
    accumulator_type: tl.constexpr = tl.int32 if integer else tl.float32
    operand_type: tl.constexpr = matrix_operand_type(x.dtype.element_ty, COMPILED)
    total_type: tl.constexpr = tl.float32 if PROMOTED else accumulator_type
    x_row = x + m_read.to(tl.int64)[None, :] * stride_x
    part = tl.arange(0, PART)[:, None]
    PARTS: tl.constexpr = HALF_BLOCK // PART
    BETWEEN: tl.constexpr = between_halves(BITS, PART)
    total = tl.zeros([BLOCK_N, BLOCK_M], total_type)
    for block in range(0, tl.cdiv(K, BLOCK)):
        for inside in tl.static_range(PARTS):
            step = block * PARTS + inside
            p_low, p_high = load_group_parameters(
                scale, group_code, n_read, N, groups, step, BITS, GROUP, PROMOTED, PART
            )
            stored = qweight, n_read, K, row_bytes, step, p_low, p_high
            if integer:
                low, high = load_halves(*stored, BITS, PART, EVEN_K, COMPILED)
            else:
                low, high = load_halves_as(*stored, BITS, PART, EVEN_K, COMPILED, operand_type, AT_ONCE)
            _, k = part_of_block(step, BITS, PART)
            k += part
            x_k = x_row + k  # the high half's address differs by a constant, which the load instruction adds
            x_low = _load_activations(x_k, k, K, SILU, EVEN_K).to(operand_type)  # [PART, BLOCK_M]
            x_high = _load_activations(x_k + BETWEEN, k + BETWEEN, K, SILU, EVEN_K).to(operand_type)
            if PROMOTED and GROUP >= BLOCK:  # both halves are of one group, whose sum is scaled once
                partial = tl.dot(low, x_low, out_dtype=accumulator_type)
                partial = tl.dot(high, x_high, partial, out_dtype=accumulator_type)
                total += partial.to(tl.float32) * p_low[:, None]
            elif PROMOTED:
                y_low = tl.dot(low, x_low, out_dtype=accumulator_type)
                total += y_low.to(tl.float32) * p_low[:, None]
                y_high = tl.dot(high, x_high, out_dtype=accumulator_type)
                total += y_high.to(tl.float32) * p_high[:, None]
            else:
                total = tl.dot(low, x_low, total, out_dtype=accumulator_type)
                total = tl.dot(high, x_high, total, out_dtype=accumulator_type)
                if AWAITED:
                    total = _awaited(total)
    if BITS == 4 and not integer:
        total = total * (1.0 / float_unit(operand_type, COMPILED))  # exact
    channel_scale = None if PROMOTED else scale
    value = epilogue(total, sx, channel_scale, bias, m_read[None, :], n_read[:, None], RAW)
    if residual is not None:
        row, output = m[None, :], n[:, None]
        value = gated(value, y, residual, stride_residual, gate, stride_gate, rows_per_gate, row, output, M, N)
    store_tile(y, N, value, m[None, :], n[:, None], M, N)


@functools.cache
def specialise(
    config: Config, fmt: WeightFormat, out_dtype: torch.dtype, even: bool, silu: bool, capability: int, integer: bool
) -> tuple[dict[str, int | bool], dict[str, int]]:
    """(compile-time constants, launch options) of :func:`in_loop_product_kernel`; ``even``: whether K is whole
    blocks; ``capability``: of the device; ``integer``: whether activations are int8.
    """
    constants = dict(
        BITS=fmt.bits,
        GROUP=fmt.group or 0,
        PROMOTED=fmt.promoted,
        RAW=out_dtype == torch.int32,
        SILU=silu,
        EVEN_K=even,
        COMPILED=not interpreting(),
        PART=columns_per_part(fmt),
        # Hopper's fragments bring neighbours along K in twos, which are not joined to be parted again; others in fours.
        AT_ONCE=2 if family(capability) == 9 else 4,
        AWAITED=family(capability) == 9 and not integer and not interpreting(),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )
    # Each operation of epilogue and promotion rounds once, as in the reference: no fused multiply-add. Sums of 16-bit
    # products have no order that backends share, so there promotion may fuse.
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    options["enable_fp_fusion"] = fmt.promoted and not integer
    if fmt.bits == 4 and not integer and family(capability) not in WARPGROUP_FAMILIES and config.num_warps == 4:
        options["maxnreg"] = MOST_REGISTERS
    return constants, options


def in_loop_product(operands: Operands, config: Config) -> torch.Tensor:
    """[M, N]; any M, N and K."""
    x, weight, fmt, y = operands.x, operands.weight, operands.weight.fmt, operands.output()
    added = operands.added
    rows, in_features = x.shape
    out_features = y.shape[1]
    constants, options = specialise(
        config,
        fmt,
        operands.out_dtype,
        in_features % BLOCK.value == 0,
        operands.silu,
        describe(x.device).capability,
        x.dtype == torch.int8,
    )
    launch(
        in_loop_product_kernel,
        (cdiv(rows, config.block_m) * cdiv(out_features, config.block_n),),
        (
            x,
            operands.sx,
            weight.qweight,
            weight.scale,
            weight.group_code,
            operands.bias,
            None if added is None else added.residual,
            None if added is None else added.gate,
            y,
            rows,
            out_features,
            in_features,
            x.stride(0),
            weight.qweight.stride(0),
            fmt.group_count(in_features),
            0 if added is None else added.residual.stride(0),
            0 if added is None else added.gate.stride(0),
            1 if added is None else added.rows_per_gate,
        ),
        constants,
        options,
    )
    return y
