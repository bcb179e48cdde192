"""Device decoders: stored weights to the int8 integers that enter a matrix product.

All products walk K in blocks of 128 and take a block as two halves of 64, the way the 4-bit layout stores them, in
parts of ``PART`` columns that lie within one group. Eight-bit weights are walked in the same way, so that every kernel
has one loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..packing import BLOCK as _BLOCK
from ..packing import HALF_BLOCK as _HALF_BLOCK

BLOCK = tl.constexpr(_BLOCK)
HALF_BLOCK = tl.constexpr(_HALF_BLOCK)

# Four stored bytes at once. $0, $1: the decoded low and high nibbles; $2: the bytes; then for each half four registers
# with the multiplier and four with the addend, of which one is read: the four bytes belong to one row, and so to one
# group. u * m + (128 - z * m) lies in 0..255 for every format (formats.largest_multiplier), so that nothing carries
# into the next byte; the flipped top bit takes the 128 off again.
DECODE_FOUR = tl.constexpr("""
{
    .reg .b32 nibbles;
    and.b32 nibbles, $2, 0x0F0F0F0F;
    mad.lo.u32 nibbles, nibbles, $3, $7;
    xor.b32 $0, nibbles, 0x80808080;
    shr.u32 nibbles, $2, 4;
    and.b32 nibbles, nibbles, 0x0F0F0F0F;
    mad.lo.u32 nibbles, nibbles, $11, $15;
    xor.b32 $1, nibbles, 0x80808080;
}
""")
DECODE_FOUR_CONSTRAINTS = tl.constexpr("=&r,=r" + ",r" * 17)


@triton.constexpr_function
def matrix_operand_type(dtype, compiled):
    """The dtype in which a product's operands meet: their own, but for bf16 in the interpreter, which would multiply
    its bits as integers.
    """
    return tl.float32 if dtype == tl.bfloat16 and not compiled else dtype


@triton.jit
def part_of_block(step, PART: tl.constexpr):
    """(first byte of the part within a row, first input of its low half) of loop step ``step``."""
    block = (step * PART) // HALF_BLOCK
    offset = step * PART - block * HALF_BLOCK
    return block * HALF_BLOCK + offset, block * BLOCK + offset


@triton.jit
def group_index(k, groups, GROUP: tl.constexpr):
    """The group of input ``k``; inputs past K belong to the last group, whose weights meet zeros."""
    if GROUP == 0:
        return k * 0
    else:
        return tl.minimum(k // GROUP, groups - 1)


@triton.jit
def _multiplier_and_zero(group_code, n, N, group):
    code = tl.load(group_code + group.to(tl.int64) * N + n).to(tl.int32)
    return (code >> 4) + 1, code & 0xF


@triton.jit
def load_halves(
    qweight,
    group_code,
    n,
    N,
    K,
    row_bytes,
    groups,
    step,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """(low, high): int8 [BLOCK_N, PART] each, the integers of outputs ``n`` at inputs k .. k + PART - 1 and k + 64 .. k
    + 64 + PART - 1 of part ``step``.
    """
    byte, k = part_of_block(step, PART)
    part = tl.arange(0, PART)
    row = qweight + n.to(tl.int64)[:, None] * row_bytes
    if BITS == 8:
        k_low = (k + part)[None, :]
        if EVEN_K:
            low = tl.load(row + k_low)
            high = tl.load(row + k_low + HALF_BLOCK)
        else:
            low = tl.load(row + k_low, mask=k_low < K, other=0)
            high = tl.load(row + k_low + HALF_BLOCK, mask=k_low + HALF_BLOCK < K, other=0)
    else:
        stored = tl.load(row + (byte + part)[None, :])
        m_low, z_low = _multiplier_and_zero(group_code, n, N, group_index(k, groups, GROUP))
        m_high, z_high = _multiplier_and_zero(group_code, n, N, group_index(k + HALF_BLOCK, groups, GROUP))
        if COMPILED:
            low, high = tl.inline_asm_elementwise(
                DECODE_FOUR,
                DECODE_FOUR_CONSTRAINTS,
                [
                    stored,
                    m_low[:, None],
                    ((128 - z_low * m_low) * 0x01010101)[:, None],
                    m_high[:, None],
                    ((128 - z_high * m_high) * 0x01010101)[:, None],
                ],
                dtype=(tl.int8, tl.int8),
                is_pure=True,
                pack=4,
            )
        else:
            low = (((stored & 0xF).to(tl.int32) - z_low[:, None]) * m_low[:, None]).to(tl.int8)
            high = (((stored >> 4).to(tl.int32) - z_high[:, None]) * m_high[:, None]).to(tl.int8)
    return low, high


@triton.jit
def load_group_scales(scale, n, N, groups, step, GROUP: tl.constexpr, PART: tl.constexpr):
    """fp32 [BLOCK_N] each: the float scales of the low and of the high half's group."""
    _, k = part_of_block(step, PART)
    low = tl.load(scale + group_index(k, groups, GROUP).to(tl.int64) * N + n)
    high = tl.load(scale + group_index(k + HALF_BLOCK, groups, GROUP).to(tl.int64) * N + n)
    return low, high
