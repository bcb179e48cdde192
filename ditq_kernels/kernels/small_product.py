"""The product of one to four rows: bound by reading the weights, so it reads each once and does without matrix
instructions.

A program is one warp. A step takes 8 stored bytes a lane of each of ``BLOCK_N`` outputs, which are 8 inputs (8 bits) or
twice 8 (4 bits, the two halves of a block); all 8 lie in one group. A lane sums code times activation over them and
multiplies by the group's factor once. Eight bytes of weights beside eight 16-bit activations: both loads then lie alike
in the lanes' registers, and nothing passes through shared memory.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..layer.formats import WeightFormat
from .config import Config, cdiv
from .decode import BLOCK, HALF_BLOCK, group_index
from .epilogue import epilogue, store_tile
from .interpreter import interpreting
from .launch import launch
from .operands import Operands
from .silu import silu

CHUNK_BYTES = 8
CHUNKS = 32  # one a lane
_CHUNK = tl.constexpr(CHUNK_BYTES)
_CHUNKS_PER_HALF = tl.constexpr(HALF_BLOCK.value // CHUNK_BYTES)


def _bytes_to_floats(word: str, first: int) -> str:
    """Assembly: four bytes of register ``word`` to floats $first .. $first + 3. A byte put under the exponent of 2**23
    is added to it; subtracting 2**23 takes it off again, exactly.
    """
    return "".join(f"    prmt.b32 ${first + i}, {word}, 0x4B000000, 0x744{i};\n" for i in range(4))


# Four stored bytes at once. $0..$3: 2**23 + the low nibbles, $4..$7: 2**23 + the high ones; $8: the bytes. Zero points
# are taken off outside, element by element: what the four bytes' groups are does not matter here.
NIBBLES_TO_FLOATS = tl.constexpr(
    "{\n    .reg .b32 low, high;\n    and.b32 low, $8, 0x0F0F0F0F;\n    shr.u32 high, $8, 4;\n"
    "    and.b32 high, high, 0x0F0F0F0F;\n" + _bytes_to_floats("low", 0) + _bytes_to_floats("high", 4) + "}"
)
NIBBLES_CONSTRAINTS = tl.constexpr("=&f" + ",=&f" * 7 + ",r")
# Four int8, their sign bit flipped: 2**23 + 128 more.
INT8_TO_FLOATS = tl.constexpr(
    "{\n    .reg .b32 flipped;\n    xor.b32 flipped, $4, 0x80808080;\n" + _bytes_to_floats("flipped", 0) + "}"
)
INT8_CONSTRAINTS = tl.constexpr("=&f,=&f,=&f,=&f,r")
TWO_TO_23 = tl.constexpr(8388608.0)
TWO_TO_23_BITS = tl.constexpr(0x4B000000)


@triton.jit
def _codes_minus_zero(stored, zero_low, zero_high, COMPILED: tl.constexpr):
    """fp32 (low, high) [1, BLOCK_N, CHUNKS, 8]: nibbles minus zero points, which come as 2**23 + zero point [1,
    BLOCK_N, CHUNKS, 1].
    """
    if COMPILED:
        low, high = tl.inline_asm_elementwise(
            NIBBLES_TO_FLOATS,
            NIBBLES_CONSTRAINTS,
            [stored],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=4,
        )
        return low - zero_low, high - zero_high
    else:
        low = (stored & 0xF).to(tl.float32) - (zero_low - TWO_TO_23)
        return low, (stored >> 4).to(tl.float32) - (zero_high - TWO_TO_23)


@triton.jit
def _int8_to_float(stored, COMPILED: tl.constexpr):
    if COMPILED:
        offset = tl.inline_asm_elementwise(
            INT8_TO_FLOATS, INT8_CONSTRAINTS, [stored], dtype=tl.float32, is_pure=True, pack=4
        )
        return offset - (TWO_TO_23 + 128)
    else:
        return stored.to(tl.float32)


@triton.jit
def _chunk_products(x_row, k, K, codes, SILU: tl.constexpr):
    """fp32 [BLOCK_M, BLOCK_N, CHUNKS, 1]: activations at inputs ``k`` [1, 1, CHUNKS, 8] times ``codes``, summed over
    the chunk.
    """
    x = tl.load(x_row + k, mask=k < K, other=0)  # [BLOCK_M, 1, CHUNKS, 8]
    if SILU:
        x = silu(x)
    return tl.sum(x.to(tl.float32) * codes, 3, keep_dims=True)


@triton.jit
def _group_parameters(group_code, n, N, k, groups, GROUP: tl.constexpr):
    """fp32 (multiplier, 2**23 + zero point) of the groups of inputs ``k``, for outputs ``n``; both shaped to broadcast.
    A nibble under the exponent of 2**23 is added to it, which spares converting it.
    """
    code = tl.load(group_code + group_index(k, groups, GROUP).to(tl.int64) * N + n).to(tl.int32)
    multiplier = ((code >> 4) | TWO_TO_23_BITS).to(tl.float32, bitcast=True) - (TWO_TO_23 - 1)
    return multiplier, ((code & 0xF) | TWO_TO_23_BITS).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["M"])
def small_product_kernel(
    x,
    qweight,
    scale,
    group_code,
    bias,
    y,
    M,
    N,
    K,
    stride_x,
    row_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PROMOTED: tl.constexpr,
    SILU: tl.constexpr,
    COMPILED: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``y[m, n] = scale[n] * sum_k x[m, k] * w[n, k] + bias[n]`` for M <= BLOCK_M; one program BLOCK_N outputs."""
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_read = tl.where(m < M, m, 0)
    n_read = tl.where(n < N, n, 0)
    # Four axes from the start, [m, n, chunk, byte]: a load that grows axes later passes through shared memory.
    x_row = x + m_read.to(tl.int64)[:, None, None, None] * stride_x
    outputs = n_read[None, :, None, None]
    w_row = qweight + outputs.to(tl.int64) * row_bytes
    inside = tl.arange(0, _CHUNK)[None, None, None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N, CHUNKS, 1], tl.float32)
    for first in range(0, tl.cdiv(row_bytes, _CHUNK), CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)[None, None, :, None]
        byte = chunk * _CHUNK + inside
        stored = tl.load(w_row + byte, mask=byte < row_bytes, other=0)  # [1, BLOCK_N, CHUNKS, 8]
        if BITS == 8:
            products = _chunk_products(x_row, byte, K, _int8_to_float(stored, COMPILED), SILU)
            if PROMOTED:
                group = group_index(chunk * _CHUNK, groups, GROUP).to(tl.int64)
                products *= tl.load(scale + group * N + outputs)
            total += products
        else:
            k = (chunk // _CHUNKS_PER_HALF) * BLOCK + (chunk % _CHUNKS_PER_HALF) * _CHUNK  # of the low halves
            m_low, z_low = _group_parameters(group_code, outputs, N, k, groups, GROUP)
            m_high, z_high = _group_parameters(group_code, outputs, N, k + HALF_BLOCK, groups, GROUP)
            low, high = _codes_minus_zero(stored, z_low, z_high, COMPILED)
            k += inside
            total += _chunk_products(x_row, k, K, low, SILU) * m_low
            total += _chunk_products(x_row, k + HALF_BLOCK, K, high, SILU) * m_high
    channel_scale = None if PROMOTED else scale
    sums = tl.sum(tl.sum(total, 3), 2)
    value = epilogue(sums, None, channel_scale, bias, m_read[:, None], n_read[None, :], False)
    store_tile(y, N, value, m[:, None], n[None, :], M, N)


@functools.cache
def specialise(
    config: Config, fmt: WeightFormat, silu: bool, x_dtype: torch.dtype
) -> tuple[dict[str, int | bool], dict[str, int]]:
    """(compile-time constants, launch options) of :func:`small_product_kernel`."""
    constants = dict(
        BITS=fmt.bits,
        GROUP=fmt.group or 0,
        PROMOTED=fmt.promoted,
        SILU=silu,
        COMPILED=not interpreting(),
        CHUNKS=CHUNKS,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )
    # Where lanes share a chunk, each adds its product to its neighbour's; fused, it would round the neighbour's only,
    # and lanes would end with different sums. Products of codes and 16-bit activations are exact either way.
    fused = x_dtype != torch.float32
    return constants, dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=fused)


def small_product(operands: Operands, config: Config) -> torch.Tensor:
    """[M, N] for M <= ``config.block_m``; activations in their own dtype."""
    x, weight, fmt, y = operands.x, operands.weight, operands.weight.fmt, operands.output()
    rows, in_features = x.shape
    out_features = y.shape[1]
    constants, options = specialise(config, fmt, operands.silu, x.dtype)
    launch(
        small_product_kernel,
        (cdiv(out_features, config.block_n),),
        (
            x,
            weight.qweight,
            weight.scale,
            weight.group_code,
            operands.bias,
            y,
            rows,
            out_features,
            in_features,
            x.stride(0),
            weight.qweight.stride(0),
            fmt.group_count(in_features),
        ),
        constants,
        options,
    )
    return y
