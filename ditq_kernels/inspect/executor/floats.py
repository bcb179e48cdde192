"""Arithmetic of floating-point numbers: IEEE with one rounding; approximate functions rounded correctly, or off by
a few units of the last place where the machine wobbles.
"""

from __future__ import annotations

import functools

import numpy as np

from .operands import DTYPE, destination, elementwise, opcode, sources

TINY = np.float32(2.0**-126)


def flush(x):
    """Subnormal numbers to zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)


def to_bf16(x):
    """fp32 to the bits of bf16, ties to even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _exact_or_odd(a, b, c):
    """fp64 ``a * b + c`` of fp32: exact, or else the neighbour whose last bit is set, which rounds to fewer bits as the
    exact value does, in any direction.
    """
    product = a.astype(np.float64) * b
    c = c.astype(np.float64)
    total = np.atleast_1d(product + c)
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = total.view(np.uint64) & np.uint64(1) == 0
    total = np.where(even & (error > 0), np.nextafter(total, np.inf), total)
    return np.where(even & (error < 0), np.nextafter(total, -np.inf), total)


def fused_multiply_add_down(a, b, c):
    """fp32, rounded towards minus infinity."""
    total = _exact_or_odd(a, b, c)
    rounded = total.astype(np.float32)
    return np.where(rounded > total, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def fused_multiply_add_narrow(a, b, c, kind):
    """Of values that fit 16 bits: fp32 values in the type ``kind``, rounded once."""
    total = _exact_or_odd(a, b, c)
    if kind == "f16x2":
        return total.astype(np.float16).astype(np.float32)
    # Once more to odd, in fp32, from which bf16 is rounded to nearest.
    narrow = total.astype(np.float32)
    off = total - narrow
    even = narrow.view(np.uint32) & np.uint32(1) == 0
    narrow = np.where(even & (off > 0), np.nextafter(narrow, np.float32(np.inf)), narrow)
    narrow = np.where(even & (off < 0), np.nextafter(narrow, np.float32(-np.inf)), narrow)
    return from_bf16(to_bf16(narrow))


def approximate_quotient(a, b):
    """Of fp32; divided by more than 2**126 it is zero, or NaN if infinite, as div.approx has it."""
    far = (np.abs(b) > np.float32(2.0**126)) & np.isfinite(b)
    return np.where(far, a * np.copysign(np.float32(0), b), a / b)


def fused_multiply_add(a, b, c):
    """fp32, rounded once: through fp64, in which the product is exact, with the sum's rounding mended where it lands
    on a tie of fp32 that it is not.
    """
    product = a.astype(np.float64) * b
    c = c.astype(np.float64)
    total = product + c
    tie = (np.atleast_1d(total).view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if tie.any():
        back = total - product
        error = (product - (total - back)) + (c - back)
        total = np.where(tie & (error > 0), np.nextafter(total, np.inf), total)
        total = np.where(tie & (error < 0), np.nextafter(total, -np.inf), total)
    return total.astype(np.float32)


def lesser(a, b):
    """The number if one is NaN; -0 is less than +0."""
    return np.where((a == 0) & (b == 0), -(-a - b), np.fmin(a, b))


def greater(a, b):
    """The number if one is NaN; +0 is greater than -0."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


FLOAT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "min": lesser,
    "max": greater,
    "neg": lambda a: -a,
    "abs": np.abs,
    "fma": fused_multiply_add,
}
PACKED = {"bf16", "bf16x2", "f16x2", "f32x2"}
UNARY = {"neg", "abs", "not"}


def unpack(value, kind):
    """fp32 [lanes, 1 or 2] of a packed type."""
    if kind == "f32x2":
        return value.view(np.float32).reshape(-1, 2)
    halves = value.view(np.uint16).reshape(-1, 1 if kind == "bf16" else 2)
    return from_bf16(halves) if kind.startswith("bf16") else halves.view(np.float16).astype(np.float32)


def pack(value, kind):
    if kind.startswith("bf16"):
        value = to_bf16(value)
    elif kind == "f16x2":
        value = value.astype(np.float16)
    return np.ascontiguousarray(value).reshape(-1).view(DTYPE[kind])


def float_operation(instruction, kernel):
    name, kind = instruction.parts[0], instruction.parts[-1]
    function = FLOAT[name]
    count = len(instruction.operands) - 1
    if (
        name != "fma" and instruction.parts[-2] == "f32" and kind in ("bf16", "f16")
    ):  # add.rn.f32.bf16: a narrow and a wide operand
        wide = from_bf16 if kind == "bf16" else (lambda x: x.astype(np.float32))
        inner = function
        return elementwise(instruction, kernel, [kind, "f32"], lambda a, b: inner(wide(a), b))
    if "rm" in instruction.parts:
        return elementwise(instruction, kernel, [kind] * 3, fused_multiply_add_down)
    if kind in PACKED:
        inner = function
        if name == "fma" and kind != "f32x2":
            inner = functools.partial(fused_multiply_add_narrow, kind=kind)
        return elementwise(
            instruction, kernel, [kind] * count, lambda *xs: pack(inner(*[unpack(x, kind) for x in xs]), kind)
        )
    if name == "div" and "full" in instruction.parts:
        keep, (a, b) = destination(instruction.operands[0], kernel), sources(instruction, ["f32"] * 2, kernel)
        return lambda m, mask: keep(m, m.approximate(a(m) / b(m)), mask)
    if name == "div" and instruction.parts[1:] == ("approx", "f32"):
        keep, (a, b) = destination(instruction.operands[0], kernel), sources(instruction, ["f32"] * 2, kernel)
        return lambda m, mask: keep(m, m.approximate(approximate_quotient(a(m), b(m))), mask)
    if "NaN" in instruction.parts:
        number = function
        function = lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.float32("nan"), number(a, b))  # noqa: E731
    if count == 3 and name in ("min", "max"):
        of_two = function
        function = lambda a, b, c: of_two(of_two(a, b), c)  # noqa: E731
    if "ftz" in instruction.parts:
        plain = function
        return elementwise(instruction, kernel, [kind] * count, lambda *xs: flush(plain(*[flush(x) for x in xs])))
    return elementwise(instruction, kernel, [kind] * count, function)


APPROXIMATE = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
}


@opcode(*APPROXIMATE)
def approximate_function(instruction, kernel):
    keep, (read,) = destination(instruction.operands[0], kernel), sources(instruction, ["f32"], kernel)
    function, ftz = APPROXIMATE[instruction.parts[0]], "ftz" in instruction.parts
    exact = "rn" in instruction.parts

    def run(m, mask):
        x = read(m)
        y = function((flush(x) if ftz else x).astype(np.float64)).astype(np.float32)
        y = y if exact else m.approximate(y)
        keep(m, flush(y) if ftz else y, mask)

    return run
