"""Arithmetic of integers, and of floats where the opcode is the same."""

from __future__ import annotations

import numpy as np

from .faults import UNSIGNED
from .floats import UNARY, float_operation
from .operands import DTYPE, elementwise, opcode
from .syntax import WIDTH


def quotient(a, b):
    """Rounded towards zero; of a division by zero, anything."""
    safe = np.where(b == 0, np.ones(1, b.dtype), b)
    if a.dtype.kind == "u":
        return a // safe
    floor = a // safe
    return floor + ((a - floor * safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)


def shift_left(a, count):
    bits = 8 * a.dtype.itemsize
    return np.where(count < bits, a << np.minimum(count, bits - 1).astype(a.dtype), np.zeros(1, a.dtype))


def shift_right(a, count):
    bits = 8 * a.dtype.itemsize
    if a.dtype.kind == "i":
        return a >> np.minimum(count, bits - 1).astype(a.dtype)
    return np.where(count < bits, a >> np.minimum(count, bits - 1).astype(a.dtype), np.zeros(1, a.dtype))


INTEGER = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "neg": lambda a: -a,
    "abs": np.abs,
    "div": quotient,
    "rem": lambda a, b: a - quotient(a, b) * b,
}
SHIFTS = {"shl": shift_left, "shr": shift_right}
HALVES = {"s16x2": np.int16, "u16x2": np.uint16}  # two in one register


def of_halves(function, half):
    """``function`` of both 16-bit halves of its operands, each by itself."""

    def run(*values):
        pairs = function(*[value.view(half).reshape(-1, 2) for value in values])
        return np.ascontiguousarray(pairs).reshape(-1).view(np.uint32)

    return run


@opcode(*INTEGER, "fma")
def arithmetic(instruction, kernel):
    name, kind = instruction.parts[0], instruction.parts[-1]
    if "f" in kind or name == "fma":
        return float_operation(instruction, kernel)
    function = of_halves(INTEGER[name], HALVES[kind]) if kind in HALVES else INTEGER[name]
    return elementwise(instruction, kernel, [kind] * (1 if name in UNARY else 2), function)


@opcode(*SHIFTS)
def shift(instruction, kernel):
    kind = instruction.parts[-1]
    return elementwise(instruction, kernel, [kind, "u32"], SHIFTS[instruction.parts[0]])


@opcode("mul")
def multiply(instruction, kernel):
    mode, kind = instruction.parts[1], instruction.parts[-1]
    if "f" in kind:
        return float_operation(instruction, kernel)
    if mode == "wide":
        wide = DTYPE[kind[0] + str(16 * WIDTH[kind])]
        return elementwise(instruction, kernel, [kind] * 2, lambda a, b: a.astype(wide) * b.astype(wide))
    if mode == "hi":
        wide, narrow = DTYPE[kind[0] + "64"], DTYPE[kind]
        return elementwise(
            instruction, kernel, [kind] * 2, lambda a, b: (a.astype(wide) * b.astype(wide) >> wide(32)).astype(narrow)
        )
    return elementwise(instruction, kernel, [kind] * 2, lambda a, b: a * b)


@opcode("mad")
def multiply_add(instruction, kernel):
    mode, kind = instruction.parts[1], instruction.parts[-1]
    if mode == "wide":
        name = kind[0] + str(16 * WIDTH[kind])
        wide = DTYPE[name]
        return elementwise(instruction, kernel, [kind, kind, name], lambda a, b, c: a.astype(wide) * b.astype(wide) + c)
    return elementwise(instruction, kernel, [kind] * 3, lambda a, b, c: a * b + c)


@opcode("bfe")
def extract_field(instruction, kernel):
    kind = instruction.parts[-1]
    dtype, bits = DTYPE[kind], 8 * WIDTH[kind]

    def extract(value, position, length):
        position, length = position & np.uint32(0xFF), np.minimum(length & np.uint32(0xFF), np.uint32(bits))
        end = np.minimum(position + length, bits)
        up = shift_left(value.view(UNSIGNED[bits // 8]), np.uint32(bits) - end).view(dtype)
        result = shift_right(up, np.uint32(bits) - (end - np.minimum(position, end)))
        return np.where(length == 0, np.zeros(1, dtype), result)

    return elementwise(instruction, kernel, [kind, "u32", "u32"], extract)


@opcode("bfi")
def insert_field(instruction, kernel):
    kind = instruction.parts[-1]

    def insert(a, b, position, length):
        position, length = position & np.uint32(0xFF), length & np.uint32(0xFF)
        ones = shift_left(np.ones(1, a.dtype), length) - np.ones(1, a.dtype)
        return (b & ~shift_left(ones, position)) | shift_left(a & ones, position)

    return elementwise(instruction, kernel, [kind, kind, "u32", "u32"], insert)
