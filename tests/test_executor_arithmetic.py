"""What executes PTX computes what the instructions say: roundings against rational arithmetic, sums of matrix
instructions against integers, fragments against plain products; and a warpgroup's instructions are waited for.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny_ptx import run

from ditq_kernels.inspect.executor import tensor_core
from ditq_kernels.inspect.executor.conversions import to_integer
from ditq_kernels.inspect.executor.faults import Fault
from ditq_kernels.inspect.executor.floats import from_bf16, fused_multiply_add, greater, lesser, to_bf16


def rounded(exact: Fraction, bits: int, smallest: int, toward_zero: bool = False) -> Fraction:
    """To ``bits`` significant bits and no finer than 2**smallest, to nearest with ties to even."""
    if not exact:
        return exact
    exponent = 0
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits + 1, smallest)
    steps = exact / unit
    return (int(steps) if toward_zero else round(steps)) * unit  # Python rounds ties to even


def fp32(values):
    return np.asarray(values, np.float32)


def test_a_fused_product_is_rounded_once():
    random = np.random.default_rng(0)
    few_bits = fp32(random.integers(2**11, 2**13, 3000) * 2.0**-12)  # products of few bits: ties are frequent
    a = np.concatenate([few_bits, fp32(random.standard_normal(3000)), fp32([1 + 2.0**-23, 1 + 2.0**-12] * 500)])
    b = np.concatenate([few_bits[::-1], fp32(random.standard_normal(3000)), fp32([1 + 2.0**-12, 1 - 2.0**-23] * 500)])
    sign = random.choice([-1, 1], len(a))
    c = fp32(sign * 2.0 ** random.integers(-70, 30, len(a)))
    tiny = slice(5000, 6000)  # results that are subnormal
    a[tiny] *= np.float32(2.0**-70)
    b[tiny] *= np.float32(2.0**-60)
    c[tiny] = fp32(sign[tiny] * 2.0 ** random.integers(-149, -126, 1000))
    found = fused_multiply_add(a, b, c)
    for x, y, z, result in zip(*(array.tolist() for array in (a, b, c, found)), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        assert Fraction(result) == rounded(exact, 24, -149), (x, y, z)
    through_fp64 = (a.astype(np.float64) * b + c.astype(np.float64)).astype(np.float32)
    assert (through_fp64 != found).any()  # what rounding twice would give


def test_a_subnormal_tie_is_rounded_once():
    """A tie of fp32 only after the sum was rounded to fp64: the rest below decides."""
    a, b = fp32([2.0**-75, 2.0**-75]), fp32([2.0**-75 * 3, 2.0**-75 * 3])  # one and a half of the smallest number
    assert fused_multiply_add(a, b, fp32([0, 0])).tolist() == [2.0**-148] * 2
    large = fp32([1 + 2.0**-23])
    for sign in (1, -1):
        found = fused_multiply_add(fp32([2.0**-100]), fp32([sign * 2.0**-100]), large)
        assert found.tolist() == large.tolist()
        # Halfway between two numbers but for 2**-200.
        product = fused_multiply_add(fp32([1 + 2.0**-12]), fp32([1 + 2.0**-12]), fp32([sign * 2.0**-100]))
        exact = Fraction(1 + 2.0**-12) ** 2 + sign * Fraction(2) ** -100
        assert Fraction(float(product[0])) == rounded(exact, 24, -149)


def test_bf16_is_rounded_to_nearest_even():
    bits = np.random.default_rng(1).integers(0, 2**32, 4000, dtype=np.uint32)
    bits[::4] = bits[::4] & 0xFFFF0000 | 0x8000  # ties
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    found = from_bf16(to_bf16(values))
    for value, result in zip(values.tolist(), found.tolist(), strict=True):
        assert Fraction(result) == rounded(Fraction(value), 8, -133)
    assert to_bf16(fp32([np.inf, -np.inf, np.nan, 3.4e38])).tolist() == [0x7F80, 0xFF80, 0x7FFF, 0x7F80]


def test_the_lesser_of_two_zeros_is_negative():
    zeros = fp32([0.0, -0.0, 0.0, -0.0, np.nan, -1.0])
    others = fp32([-0.0, 0.0, 0.0, -0.0, -1.0, np.nan])
    assert np.signbit(lesser(zeros, others)).tolist() == [True, True, False, True, True, True]
    assert np.signbit(greater(zeros, others)).tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("mode,start,expected", [("idx", 33, [1] * 32), ("up", 1, [0, *range(31)])])
def test_a_shuffle_takes_five_bits_of_a_lane(mode, start, expected):
    y = torch.full((32,), -1, dtype=torch.int32)
    clamp = 0 if mode == "up" else 31
    run(f"shfl.sync.{mode}.b32 %r1, lane, {start}, {clamp}, -1;\nst.global.b32 [y_at], %r1;", threads=32, y=y)
    assert y.tolist() == expected


def test_integers_of_floats():
    x = fp32([0.5, 1.5, -2.5, 126.5, 127.5, 3e9, -3e9, np.nan, np.inf])
    assert to_integer("s8", "rni")(x).tolist() == [0, 2, -2, 126, 127, 127, -128, 0, 127]
    assert to_integer("s32", "rzi")(x).tolist() == [0, 1, -2, 126, 127, 2**31 - 1, -(2**31), 0, 2**31 - 1]
    assert to_integer("u8", "rmi")(x).tolist() == [0, 1, 0, 126, 127, 255, 0, 0, 255]


@pytest.mark.parametrize("arch", [80, 90])
def test_fp32_sums_of_matrix_instructions_are_aligned_and_cut(arch):
    at_once, bits = unit = tensor_core.unit_of(arch)
    random = np.random.default_rng(2)
    shape = (1, 4, 32)
    spread = lambda: np.exp2(random.integers(-12, 13, shape)) * random.standard_normal(shape)  # noqa: E731
    x, w = (from_bf16(to_bf16(fp32(spread()))) for _ in range(2))
    before = fp32(random.standard_normal((1, 4, 4)) * 100)
    found = tensor_core.multiply_accumulate(before, x, w, "f32", unit)
    for row in range(4):
        for column in range(4):
            total = Fraction(float(before[0, row, column]))
            for k in range(0, 32, at_once):
                pairs = zip(x[0, row, k : k + at_once].tolist(), w[0, column, k : k + at_once].tolist(), strict=True)
                terms = [total, *(Fraction(a) * Fraction(b) for a, b in pairs)]
                largest = max(abs(term) for term in terms)
                # The largest keeps ``bits`` bits behind its first; the others are cut at the same place.
                place = 0
                while Fraction(2) ** place > largest:
                    place -= 1
                while Fraction(2) ** (place + 1) <= largest:
                    place += 1
                unit_of_sum = Fraction(2) ** (place - bits)
                total = sum(int(term / unit_of_sum) for term in terms) * unit_of_sum
                total = rounded(total, 24, -149, toward_zero=True)
            assert Fraction(float(found[0, row, column])) == total
    assert (found != tensor_core.multiply_accumulate(before, x, w, "f32", None)).any()


def test_integer_sums_wrap_or_saturate():
    ones, before = np.ones((1, 1, 32), np.float32), np.full((1, 1, 1), 2**31 - 5, np.int32)
    assert tensor_core.multiply_accumulate(before, ones, ones, "s32", None).item() == -(2**31) + 27
    assert tensor_core.multiply_accumulate(before, ones, ones, "s32", None, saturates=True).item() == 2**31 - 1


# One warp's product: A [16, 32 bytes] and B [8, 32 bytes] row by row; each lane takes from row lane / 4 the four bytes
# at lane % 4, and the fourfold further on.
MMA = """
shr.u32 %r1, lane, 2;
and.b32 %r2, lane, 3;
shl.b32 %r3, %r1, 5;
shl.b32 %r4, %r2, 2;
add.u32 %r5, %r3, %r4;
cvt.u64.u32 %d1, %r5;
add.u64 %d2, x, %d1;
add.u64 %d3, w, %d1;
ld.global.b32 %r10, [%d2];
ld.global.b32 %r11, [%d2+256];
ld.global.b32 %r12, [%d2+16];
ld.global.b32 %r13, [%d2+272];
ld.global.b32 %r20, [%d3];
ld.global.b32 %r21, [%d3+16];
// load
mov.b32 %r30, 0;
mma.sync.aligned.{shape} {{%r31,%r32,%r33,%r34}}, {{%r10,%r11,%r12,%r13}}, {{%r20,%r21}}, {{%r30,%r30,%r30,%r30}};
shl.b32 %r6, %r2, 3;
add.u32 %r6, %r3, %r6;
cvt.u64.u32 %d4, %r6;
add.u64 %d5, y, %d4;
st.global.v2.b32 [%d5], {{%r31,%r32}};
st.global.v2.b32 [%d5+256], {{%r33,%r34}};
"""
SHAPES = {torch.int8: "m16n8k32.row.col.s32.s8.s8.s32", torch.bfloat16: "m16n8k16.row.col.f32.bf16.bf16.f32"}


def operands(kind, rows, columns):
    """A and B whose products are exact, no two lines alike."""
    k = 32 // kind.itemsize
    x = torch.randint(-9, 10, (rows, k), generator=torch.Generator().manual_seed(0)).to(kind)
    w = torch.randint(-9, 10, (columns, k), generator=torch.Generator().manual_seed(1)).to(kind)
    return x, w, torch.zeros(rows, columns, dtype=torch.int32 if kind == torch.int8 else torch.float32)


@pytest.mark.parametrize("kind", SHAPES)
def test_fragments_of_a_warp(kind):
    x, w, y = operands(kind, 16, 8)
    run(MMA.format(shape=SHAPES[kind]), threads=32, x=x, w=w, y=y)
    assert torch.equal(y.double(), x.double() @ w.double().T)
    exchanged = MMA.replace("{%r10,%r11,", "{%r11,%r10,").replace("{{%r10,%r11,", "{{%r11,%r10,")
    y = torch.zeros_like(y)
    run(exchanged.format(shape=SHAPES[kind]), threads=32, x=x, w=w, y=y)
    assert not torch.equal(y.double(), x.double() @ w.double().T)


# Rows through shared memory: 16 of 32 bytes; lane l names row l % 16, half l / 16.
LDMATRIX = """
shl.b32 %r7, t, 4;
cvt.u64.u32 %d6, %r7;
add.u64 %d6, x, %d6;
add.u32 %r7, %r7, %r98;
ld.global.v4.b32 {{%r40,%r41,%r42,%r43}}, [%d6];
st.shared.v4.b32 [%r7], {{%r40,%r41,%r42,%r43}};
and.b32 %r8, lane, 15;
shl.b32 %r8, %r8, 5;
and.b32 %r9, lane, 16;
add.u32 %r8, %r8, %r9;
add.u32 %r8, %r8, %r98;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10,%r11,%r12,%r13}}, [%r8];
"""
# B as [16 inputs, 8 outputs], turned while it is loaded.
TURNED = """
setp.lt.u32 %p1, t, 16;
shl.b32 %r7, t, 4;
cvt.u64.u32 %d6, %r7;
add.u64 %d6, turned, %d6;
add.u32 %r7, %r7, %r98;
@%p1 ld.global.v4.b32 {{%r40,%r41,%r42,%r43}}, [%d6];
@%p1 st.shared.v4.b32 [%r7], {{%r40,%r41,%r42,%r43}};
and.b32 %r8, lane, 15;
shl.b32 %r8, %r8, 4;
add.u32 %r8, %r8, %r98;
ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r20,%r21}}, [%r8];
"""


def test_matrices_loaded_from_shared_memory():
    for kind in SHAPES:
        x, w, y = operands(kind, 16, 8)
        run(MMA.replace("// load", LDMATRIX).format(shape=SHAPES[kind]), threads=32, x=x, w=w, y=y)
        assert torch.equal(y.double(), x.double() @ w.double().T)
    x, w, y = operands(torch.bfloat16, 16, 8)
    body = MMA.replace("// load", TURNED).format(shape=SHAPES[torch.bfloat16])
    run(body, threads=32, x=x, w=w, y=y, turned=w.T.contiguous())
    assert torch.equal(y.double(), x.double() @ w.double().T)
    with pytest.raises(Fault, match="not aligned to 16 bytes"):
        run(body.replace("[%r8]", "[%r8+8]"), threads=32, x=x, w=w, y=y, turned=w.T.contiguous())


# One warpgroup's product from shared memory: A [64, 32 bytes] as 8 x 16 byte cores, two beside each other, then the
# next eight rows; B [8, 32 bytes] behind it, likewise.
WGMMA = """
shl.b32 %r1, t, 4;
cvt.u64.u32 %d1, %r1;
add.u64 %d2, x, %d1;
add.u64 %d3, w, %d1;
add.u32 %r1, %r1, %r98;
setp.lt.u32 %p1, t, 16;
ld.global.v4.b32 {%r10,%r11,%r12,%r13}, [%d2];
@%p1 ld.global.v4.b32 {%r14,%r15,%r16,%r17}, [%d3];
st.shared.v4.b32 [%r1], {%r10,%r11,%r12,%r13};
@%p1 st.shared.v4.b32 [%r1+2048], {%r14,%r15,%r16,%r17};
fence.proxy.async.shared::cta;
bar.sync 0;
shr.u32 %r2, %r98, 4;
cvt.u64.u32 %d4, %r2;
or.b64 %d4, %d4, 0x1000080000; // 128 bytes from core to core, 256 to the next eight rows
add.u64 %d5, %d4, 128;
mov.b32 %r31, 0;
mov.b32 %r32, 0;
mov.b32 %r33, 0;
mov.b32 %r34, 0;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%r31,%r32,%r33,%r34}, %d4, %d5, 1;
// issued
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
// done
shr.u32 %r3, t, 5;
shl.b32 %r3, %r3, 9;
shl.b32 %r4, lane, 3;
add.u32 %r3, %r3, %r4;
cvt.u64.u32 %d6, %r3;
add.u64 %d7, y, %d6;
st.global.v2.b32 [%d7], {%r31,%r32};
st.global.v2.b32 [%d7+256], {%r33,%r34};
"""
FROM_REGISTERS = WGMMA.replace("{%r31,%r32,%r33,%r34}, %d4,", "{%r31,%r32,%r33,%r34}, {%r20,%r21,%r22,%r23},").replace(
    "wgmma.fence",
    """
    shr.u32 %r5, lane, 2;
    shl.b32 %r6, warp, 4;
    add.u32 %r5, %r5, %r6;
    shl.b32 %r5, %r5, 5;
    and.b32 %r6, lane, 3;
    shl.b32 %r6, %r6, 2;
    add.u32 %r5, %r5, %r6;
    cvt.u64.u32 %d8, %r5;
    add.u64 %d8, plain, %d8;
    ld.global.b32 %r20, [%d8];
    ld.global.b32 %r21, [%d8+256];
    ld.global.b32 %r22, [%d8+16];
    ld.global.b32 %r23, [%d8+272];
    wgmma.fence""",
    1,
)

FENCE = "wgmma.fence.sync.aligned;\n"


def cores(matrix):
    """Eight rows of 16 bytes, then the 16 bytes beside them, then the next eight rows."""
    return matrix.view(-1, 8, 2, 16).transpose(1, 2).contiguous()


def warpgroup_product(body):
    x, w, y = operands(torch.int8, 64, 8)
    registers = {"plain": x} if "plain" in body else {}
    run(body, threads=128, x=cores(x), w=cores(w), y=y, **registers)
    return torch.equal(y.double(), x.double() @ w.double().T)


def test_fragments_and_descriptors_of_a_warpgroup():
    assert warpgroup_product(WGMMA) and warpgroup_product(FROM_REGISTERS)
    assert not warpgroup_product(WGMMA.replace("0x1000080000", "0x800080000"))
    assert not warpgroup_product(FROM_REGISTERS.replace("{%r20,%r21,", "{%r21,%r20,"))
    (issue,) = (line for line in WGMMA.splitlines() if "mma_async" in line)
    assert not warpgroup_product(WGMMA.replace("// issued", issue))  # adds to the same sums, and needs no fence for it


@pytest.mark.parametrize(
    ("body", "taken", "instead", "message"),
    [
        (WGMMA, "fence.proxy.async.shared::cta;", "", "an engine reads stores that no fence.proxy.async has shown"),
        (WGMMA, "bar.sync 0;", "", "reads what was written by warp"),
        (WGMMA, "wgmma.fence.sync.aligned;", "", "without a wgmma.fence"),
        (
            WGMMA,
            "wgmma.fence.sync.aligned;",
            "wgmma.fence.sync.aligned;\nadd.u32 %r31, %r31, 1;",
            "without a wgmma.fence",
        ),
        (WGMMA, FENCE, FENCE + "bra NEXT;\nNEXT:", None),  # the fence may stand in an earlier block
        (WGMMA, FENCE, FENCE + "add.u32 %r31, %r31, 0;\nbra NEXT;\nNEXT:", "without a wgmma.fence"),
        (WGMMA, "wgmma.commit_group.sync.aligned;", "", "touches the sums"),
        (WGMMA, "wgmma.wait_group.sync.aligned 0;", "", "touches the sums"),
        (WGMMA, "wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", "touches the sums"),
        (WGMMA, "wgmma.wait_group.sync.aligned 0;", "ret;", "ends before matrix instructions"),
        (WGMMA, "// issued", "add.u32 %r40, %r34, 1;", "touches the sums"),
        (WGMMA, "// issued", "st.shared.b32 [%r1], t;", "overwrites what was read by a matrix instruction"),
        (WGMMA, "// done", "st.shared.b32 [%r1], t;", None),
        (FROM_REGISTERS, "// issued", "mov.b32 %r22, 0;", "overwrites an operand"),
        (FROM_REGISTERS, "// issued", "add.u32 %r40, %r22, 1;", None),  # to read it is allowed
        (FROM_REGISTERS, "// done", "mov.b32 %r22, 0;", None),
    ],
)
def test_what_a_warpgroups_product_needs(body, taken, instead, message):
    changed = body.replace(taken, instead, 1)
    assert changed != body
    if message is None:
        warpgroup_product(changed)
    else:
        with pytest.raises(Fault, match=message):
            warpgroup_product(changed)
