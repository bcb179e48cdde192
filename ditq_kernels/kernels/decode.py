"""Device decoders: stored weights to the int8 integers that enter a matrix product.

All products walk K in blocks of 128 and take a block as two halves of 64, the way the 4-bit layout stores them, in
parts of ``PART`` columns that lie within one group. Eight-bit weights are walked in the same way, so that every kernel
has one loop; only that their two parts of a step are neighbours, so that groups come in ascending order.
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

# ---- 4-bit weights to floats ----
# A nibble becomes a float by being put into one's bits, and a multiply-add with its group's terms makes m * (u - z) of
# it. Every element brings terms of its own: which elements share a register is the compiler's to decide, and they may
# be of different outputs. High nibbles stay where they are, where they are worth sixteen times as much.


def _two_nibble_pairs(kind: str, source: str, selector: str, low: int, high: int, terms: tuple[int, ...]) -> str:
    """Assembly: two bytes of ``source``, set apart by zero bytes, to a pair from their low and one from their high
    nibbles.
    """
    m_low, a_low, m_high, a_high = terms
    return f"""
    prmt.b32 bytes, {source}, 0, {selector};
    and.b32 codes, bytes, 0x000F000F;
    fma.rn.{kind} ${low}, codes, ${m_low}, ${a_low};
    and.b32 codes, bytes, 0x00F000F0;
    fma.rn.{kind} ${high}, codes, ${m_high}, ${a_high};"""


def _two_nibbles(kind: str) -> str:
    """$0, $1: pairs from the low and the high nibbles of the two bytes $2; $3 .. $6: pairs of terms."""
    pairs = _two_nibble_pairs(kind, "bytes", "0x4140", 0, 1, (3, 4, 5, 6))
    return "{\n    .reg .b32 bytes, codes;\n    cvt.u32.u16 bytes, $2;" + pairs + "\n}"


def _four_nibbles(kind: str) -> str:
    """$0, $1 and $2, $3: pairs from the low and the high nibbles of the four bytes $4; $5 .. $12: terms in two pairs
    each.
    """
    first = _two_nibble_pairs(kind, "$4", "0x4140", 0, 2, (5, 7, 9, 11))
    second = _two_nibble_pairs(kind, "$4", "0x4342", 1, 3, (6, 8, 10, 12))
    return "{\n    .reg .b32 bytes, codes;" + first + second + "\n}"


TWO_NIBBLES_TO_BF16 = tl.constexpr(_two_nibbles("bf16x2"))
TWO_NIBBLES_TO_FP16 = tl.constexpr(_two_nibbles("f16x2"))
TWO_NIBBLES_CONSTRAINTS = tl.constexpr("=&r,=&r,h,r,r,r,r")
FOUR_NIBBLES_TO_BF16 = tl.constexpr(_four_nibbles("bf16x2"))
FOUR_NIBBLES_TO_FP16 = tl.constexpr(_four_nibbles("f16x2"))
FOUR_NIBBLES_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r" + ",r" * 9)


def _bytes_under(pattern: str, first: int) -> str:
    """Assembly: the four bytes of ``codes``, each as the third-highest byte of ``pattern``, to $first .. $first + 3."""
    return "".join(f"\n    prmt.b32 ${first + i}, codes, {pattern}, 0x75{i}4;" for i in range(4))


# $0 .. $3 and $4 .. $7: the low and the high nibbles of the four bytes $8, under the exponent of 2**15, where the
# third-highest byte counts ones.
NIBBLES_TO_FP32 = tl.constexpr(
    "{\n    .reg .b32 codes;\n    and.b32 codes, $8, 0x0F0F0F0F;"
    + _bytes_under("0x47000000", 0)
    + "\n    and.b32 codes, $8, 0xF0F0F0F0;"
    + _bytes_under("0x47000000", 4)
    + "\n}"
)
NIBBLES_TO_FP32_CONSTRAINTS = tl.constexpr("=&f" + ",=&f" * 7 + ",r")
FP32_BASE = tl.constexpr(1 << 15)


@triton.constexpr_function
def float_unit(dtype, compiled):
    """What the integer 1 becomes in :func:`load_halves_as`, whose products are multiplied by its inverse: a power of
    two for which multipliers of codes, up to 16, are numbers of ``dtype``.
    """
    if not compiled or dtype == tl.float32:
        return 1.0
    return 2.0**-10 if dtype == tl.bfloat16 else 2.0**-14


@triton.constexpr_function
def _code_unit(dtype):
    """What the last bit of a 16-bit float is worth where its exponent's bits are zero: a byte there needs no
    conversion. (The multiply-adds take such numbers as they are.)
    """
    return 2.0**-133 if dtype == tl.bfloat16 else 2.0**-24


@triton.constexpr_function
def matrix_operand_type(dtype, compiled):
    """The dtype in which a product's operands meet: their own, but for bf16 in the interpreter, which would multiply
    its bits as integers.
    """
    return tl.float32 if dtype == tl.bfloat16 and not compiled else dtype


@triton.constexpr_function
def between_halves(bits, part):
    """How many inputs the high half of a step lies behind the low one."""
    return _HALF_BLOCK if bits == 4 else part


@triton.jit
def part_of_block(step, BITS: tl.constexpr, PART: tl.constexpr):
    """(first byte of the part within a row, first input of its low half) of loop step ``step``."""
    if BITS == 8:
        return step * (2 * PART), step * (2 * PART)
    else:
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
        _, k = part_of_block(step, BITS, PART)
        outputs = parameters + n
        low = tl.load(outputs + group_index(k, groups, GROUP).to(tl.int64) * N)
        if GROUP == 0 or GROUP >= BLOCK:
            return low, low
        else:
            high = group_index(k + between_halves(BITS, PART), groups, GROUP)
            return low, tl.load(outputs + high.to(tl.int64) * N)


@triton.jit
def _decode(codes, group):
    """:func:`_decode_four` for the interpreter, which has no assembly."""
    multiplier = (group >> 4) + 1
    return ((codes.to(tl.int32) - (group & 0xF)) * multiplier).to(tl.int8)


@triton.jit
def _load_int8(qweight, n, K, row_bytes, step, PART: tl.constexpr, EVEN_K: tl.constexpr):
    """(low, high): int8 [BLOCK_N, PART] each, 8-bit weights as stored."""
    _, k = part_of_block(step, 8, PART)
    k_low = (k + tl.arange(0, PART))[None, :]
    weights = qweight + n.to(tl.int64)[:, None] * row_bytes + k_low
    if EVEN_K:
        return tl.load(weights), tl.load(weights + between_halves(8, PART))
    else:
        low = tl.load(weights, mask=k_low < K, other=0)
        return low, tl.load(weights + between_halves(8, PART), mask=k_low + between_halves(8, PART) < K, other=0)


@triton.jit
def _load_bytes(qweight, n, row_bytes, step, PART: tl.constexpr):
    """uint8 [BLOCK_N, PART]: 4-bit weights as stored, codes of the low half in low and of the high half in high
    nibbles.
    """
    byte, _ = part_of_block(step, 4, PART)
    return tl.load(qweight + n.to(tl.int64)[:, None] * row_bytes + (byte + tl.arange(0, PART))[None, :])


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
    """(low, high): int8 [BLOCK_N, PART] each, the integers of outputs ``n`` at inputs k .. k + PART - 1 of part
    ``step`` and at those ``between_halves(BITS, PART)`` further on, whose groups hold ``parameters_low`` and
    ``parameters_high``.

    Compiled, it is right only where the four bytes of a register are of one output: so they are where k runs along the
    registers, which :mod:`.packed_operands` sees to.
    """
    if BITS == 8:
        return _load_int8(qweight, n, K, row_bytes, step, PART, EVEN_K)
    else:
        stored = _load_bytes(qweight, n, row_bytes, step, PART)
        group_low = parameters_low.to(tl.int32)[:, None]
        group_high = parameters_high.to(tl.int32)[:, None]
        if COMPILED:
            return tl.inline_asm_elementwise(
                DECODE_FOUR,
                DECODE_FOUR_CONSTRAINTS,
                [stored, group_low, group_high],
                dtype=(tl.int8, tl.int8),
                is_pure=True,
                pack=4,
            )
        else:
            return _decode(stored & 0xF, group_low), _decode(stored >> 4, group_high)


@triton.jit
def _terms(group, base: tl.constexpr, code_unit: tl.constexpr, unit: tl.constexpr, dtype: tl.constexpr):
    """(multiplier, addend), [BLOCK_N, 1] each, of group bytes ``group``: what makes ``m * (u - z)``, in units of
    ``unit``, of a code that reads ``(base + u) * code_unit``. All are exact.
    """
    multiplier = ((group.to(tl.int32) >> 4) + 1)[:, None]
    addend = -(multiplier * ((group.to(tl.int32) & 0xF) + base)[:, None])
    return (multiplier.to(tl.float32) * (unit / code_unit)).to(dtype), (addend.to(tl.float32) * unit).to(dtype)


@triton.jit
def _decode_to_pairs(stored, group_low, group_high, dtype: tl.constexpr, AT_ONCE: tl.constexpr):
    """(low, high) halves of ``stored`` in ``dtype``, bf16 or fp16, in units of ``float_unit(dtype, True)``."""
    unit: tl.constexpr = float_unit(dtype, True)
    code_unit: tl.constexpr = _code_unit(dtype)
    m_low, a_low = _terms(group_low, 0, code_unit, unit, dtype)
    m_high, a_high = _terms(group_high, 0, 16 * code_unit, unit, dtype)
    if AT_ONCE == 2:
        return tl.inline_asm_elementwise(
            TWO_NIBBLES_TO_BF16 if dtype == tl.bfloat16 else TWO_NIBBLES_TO_FP16,
            TWO_NIBBLES_CONSTRAINTS,
            [stored, m_low, a_low, m_high, a_high],
            dtype=(tl.bfloat16, tl.bfloat16) if dtype == tl.bfloat16 else (tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            FOUR_NIBBLES_TO_BF16 if dtype == tl.bfloat16 else FOUR_NIBBLES_TO_FP16,
            FOUR_NIBBLES_CONSTRAINTS,
            [stored, m_low, a_low, m_high, a_high],
            dtype=(tl.bfloat16, tl.bfloat16) if dtype == tl.bfloat16 else (tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )


@triton.jit
def load_halves_as(
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
    dtype: tl.constexpr,
    AT_ONCE: tl.constexpr = 4,
):
    """:func:`load_halves` in ``dtype`` (bf16, fp16 or fp32), in any layout: of 4-bit weights in units of
    ``float_unit(dtype, COMPILED)``. ``AT_ONCE``: the bytes that one piece of assembly decodes to 16 bits, 2 or 4.
    """
    if BITS == 8:
        low, high = _load_int8(qweight, n, K, row_bytes, step, PART, EVEN_K)
        return low.to(dtype), high.to(dtype)
    else:
        stored = _load_bytes(qweight, n, row_bytes, step, PART)
        if not COMPILED:
            low = _decode(stored & 0xF, parameters_low.to(tl.int32)[:, None])
            high = _decode(stored >> 4, parameters_high.to(tl.int32)[:, None])
            return low.to(dtype), high.to(dtype)
        elif dtype == tl.float32:
            low, high = tl.inline_asm_elementwise(
                NIBBLES_TO_FP32,
                NIBBLES_TO_FP32_CONSTRAINTS,
                [stored],
                dtype=(tl.float32, tl.float32),
                is_pure=True,
                pack=4,
            )
            m_low, a_low = _terms(parameters_low, FP32_BASE, 1, 1, tl.float32)
            m_high, a_high = _terms(parameters_high, FP32_BASE // 16, 16, 1, tl.float32)
            return low * m_low + a_low, high * m_high + a_high
        else:
            return _decode_to_pairs(stored, parameters_low, parameters_high, dtype, AT_ONCE)
