"""Bits and bytes rearranged, compared and chosen."""

from __future__ import annotations

import numpy as np

from .operands import destination, elementwise, opcode, source
from .syntax import SINK, Pair


@opcode("prmt")
def permute_bytes(instruction, kernel):
    def permute(a, b, selector):
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.zeros(1, np.uint32)
        for place in range(4):
            chosen = (selector >> np.uint32(4 * place)) & np.uint32(15)
            byte = (both >> ((chosen & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(
                255
            )
            if (chosen & np.uint32(8)).any():
                sign = np.where(byte > 127, np.uint32(255), np.uint32(0))
                byte = np.where(chosen > 7, sign, byte)
            result = result | (byte << np.uint32(8 * place))
        return result

    return elementwise(instruction, kernel, ["b32"] * 3, permute)


@opcode("lop3")
def logic_of_three(instruction, kernel):
    *operands, table = instruction.operands
    instruction.operands = operands

    def logic(a, b, c):
        result = np.zeros(1, np.uint32)
        for row in range(8):
            if table.bits >> row & 1:
                terms = [x if row >> place & 1 else ~x for x, place in ((a, 2), (b, 1), (c, 0))]
                result = result | (terms[0] & terms[1] & terms[2])
        return result

    return elementwise(instruction, kernel, ["b32"] * 3, logic)


COMPARE = {
    "eq": lambda a, b: a == b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
COMPARE |= {"lo": COMPARE["lt"], "ls": COMPARE["le"], "hi": COMPARE["gt"], "hs": COMPARE["ge"]}


def comparison(name, is_float):
    """Of floats: false where either is NaN, or with a final u true."""
    if not is_float:
        return (lambda a, b: a != b) if name == "ne" else COMPARE[name]
    if name in ("num", "nan"):
        unordered = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
        return unordered if name == "nan" else lambda a, b: ~unordered(a, b)
    if name in ("ne", "neu"):
        return (lambda a, b: a != b) if name == "neu" else lambda a, b: (a < b) | (a > b)
    if name.endswith("u"):
        inner = COMPARE[name[:-1]]
        return lambda a, b: inner(a, b) | np.isnan(a) | np.isnan(b)
    return COMPARE[name]


@opcode("setp")
def set_predicate(instruction, kernel):
    kind = instruction.parts[-1]
    compare = comparison(instruction.parts[1], kind.startswith("f"))
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(instruction.parts[2])
    result, a, b, *third = instruction.operands
    first, second = (result.first, result.second) if isinstance(result, Pair) else (result, SINK)
    keep, keep_not = destination(first, kernel), destination(second, kernel)
    a, b = source(a, kind, kernel), source(b, kind, kernel)
    c = source(third[0], "pred", kernel) if third else None

    def run(m, mask):
        found = compare(a(m), b(m))
        other = ~found
        if c is not None:
            found, other = combine(found, c(m)), combine(other, c(m))
        keep(m, found, mask)
        keep_not(m, other, mask)

    return run


@opcode("selp")
def select(instruction, kernel):
    kind = instruction.parts[-1]
    return elementwise(instruction, kernel, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b))
