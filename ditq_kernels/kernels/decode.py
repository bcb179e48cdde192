"""Device decoders: stored weights to the int8 integers that enter a matrix product.

All products walk K in blocks of 128 and take a block as two halves of 64, the way the 4-bit layout stores them, in
parts of ``PART`` columns that lie within one group. Eight-bit weights are walked in the same way, so that every kernel
has one loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..layer.packing import BLOCK as _BLOCK
from ..layer.packing import HALF_BLOCK as _HALF_BLOCK

BLOCK = tl.constexpr(_BLOCK)
HALF_BLOCK = tl.constexpr(_HALF_BLOCK)


def _decode_four(codes: str, result: str, group: str) -> str:
    """Assembly: four nibbles in the bytes of ``codes``, of one group, to the int8 ``m * (u - z)``.

    u * m + (128 - z * m) lies in 0..255 for every format (formats.largest_multiplier), so that nothing carries into the
    next byte; the flipped top bit takes the 128 off again.
    """
    return f"""
    shr.u32 m, {group}, 4;
    add.u32 m, m, 1;
    and.b32 addend, {group}, 15;
    mul.lo.u32 addend, addend, m;
    mad.lo.u32 addend, addend, 0xFEFEFEFF, 0x80808080;
    mad.lo.u32 {codes}, {codes}, m, addend;
    xor.b32 {result}, {codes}, 0x80808080;
"""


# Four stored bytes at once. $0, $1: the decoded low and high nibbles; $2: the bytes; then for each half four registers
# with the group's byte, of which one is read: the four bytes belong to one row, and so to one group.
DECODE_FOUR = tl.constexpr(
    """{
    .reg .b32 codes, m, addend;
    and.b32 codes, $2, 0x0F0F0F0F;"""
    + _decode_four("codes", "$0", "$3")
    + """
    shr.u32 codes, $2, 4;
    and.b32 codes, codes, 0x0F0F0F0F;"""
    + _decode_four("codes", "$1", "$7")
    + "}"
)
DECODE_FOUR_CONSTRAINTS = tl.constexpr("=&r,=r" + ",r" * 9)


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
def load_group_parameters(
    scale,
    group_code,
    n,
    N,
    groups,
    step,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    PROMOTED: tl.constexpr,
    PART: tl.constexpr,
):
    """What the groups of the low and of the high half of part ``step`` hold for outputs ``n``, [BLOCK_N] each: float
    scales of promoted formats, bytes of two-level ones, of others nothing that anyone reads.
    """
    if not PROMOTED and BITS == 8:
        return n, n
    else:
        parameters = scale if PROMOTED else group_code
        _, k = part_of_block(step, PART)
        outputs = parameters + n
        low = tl.load(outputs + group_index(k, groups, GROUP).to(tl.int64) * N)
        if GROUP == 0 or GROUP >= BLOCK:
            return low, low
        else:
            return low, tl.load(outputs + group_index(k + HALF_BLOCK, groups, GROUP).to(tl.int64) * N)


@triton.jit
def _decode(codes, group):
    """:func:`_decode_four` for the interpreter, which has no assembly."""
    multiplier = (group >> 4) + 1
    return ((codes.to(tl.int32) - (group & 0xF)) * multiplier).to(tl.int8)


@triton.jit
def load_halves(
    qweight,
    n,
    K,
    row_bytes,
    step,
    parameters_low,
    parameters_high,
    BITS: tl.constexpr,
    PART: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """(low, high): int8 [BLOCK_N, PART] each, the integers of outputs ``n`` at inputs k .. k + PART - 1 and k + 64 .. k
    + 64 + PART - 1 of part ``step``, whose groups hold ``parameters_low`` and ``parameters_high``.
    """
    byte, k = part_of_block(step, PART)
    part = tl.arange(0, PART)
    row = qweight + n.to(tl.int64)[:, None] * row_bytes
    if BITS == 8:
        k_low = (k + part)[None, :]
        weights = row + k_low
        if EVEN_K:
            low = tl.load(weights)
            high = tl.load(weights + HALF_BLOCK)
        else:
            low = tl.load(weights, mask=k_low < K, other=0)
            high = tl.load(weights + HALF_BLOCK, mask=k_low + HALF_BLOCK < K, other=0)
    else:
        stored = tl.load(row + (byte + part)[None, :])
        group_low = parameters_low.to(tl.int32)[:, None]
        group_high = parameters_high.to(tl.int32)[:, None]
        if COMPILED:
            low, high = tl.inline_asm_elementwise(
                DECODE_FOUR,
                DECODE_FOUR_CONSTRAINTS,
                [stored, group_low, group_high],
                dtype=(tl.int8, tl.int8),
                is_pure=True,
                pack=4,
            )
        else:
            low, high = _decode(stored & 0xF, group_low), _decode(stored >> 4, group_high)
    return low, high
