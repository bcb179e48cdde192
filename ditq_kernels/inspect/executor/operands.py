"""Operands, read once: an operand becomes a function of the machine that gives an array, a result one that keeps it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .faults import LOCAL_BASE, PARAMETER_BASE, SHARED_BASE, UNSIGNED, Unsupported
from .syntax import SINK, WIDTH, Immediate, Instruction, Kernel, Not, Symbol, Vector

DTYPE = {f"{kind}{8 * width}": UNSIGNED[width] for kind in "bu" for width in (1, 2, 4, 8)}
DTYPE |= {"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64}
DTYPE |= {"f16": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_}
DTYPE |= {"bf16": np.uint16, "bf16x2": np.uint32, "f16x2": np.uint32, "f32x2": np.uint64, "b128": UNSIGNED[16]}
DTYPE |= {"s16x2": np.uint32, "u16x2": np.uint32}

Builder = Callable[[Instruction, Kernel], Callable]
BUILDERS: dict[str, Builder] = {}


def opcode(*names: str) -> Callable[[Builder], Builder]:
    """Registers what makes, of an instruction, a function (machine, lanes) that carries it out."""

    def register(builder: Builder) -> Builder:
        for name in names:
            BUILDERS[name] = builder
        return builder

    return register


def constant(value: int, kind: str) -> np.ndarray:
    """An integer or the bits of a float, as an array of one element."""
    width = WIDTH[kind]
    return np.array([value & (256**width - 1)], UNSIGNED[width]).view(DTYPE[kind])


def source(operand, kind: str, kernel: Kernel) -> Callable:
    """A function of the machine that gives the operand as an array of ``kind``."""
    if isinstance(operand, Not):
        inner = source(operand.of, kind, kernel)
        return lambda m: ~inner(m)
    if isinstance(operand, Immediate):
        if kind == "pred":
            value = np.array([bool(operand.bits)])
        elif operand.is_float or kind not in ("f16", "f32", "f64"):
            value = constant(operand.bits, kind)
        else:
            value = np.array([operand.bits], DTYPE[kind])
        return lambda m: value
    if isinstance(operand, Symbol):
        return _symbol(operand.name, kind, kernel)
    index, held, wanted, dtype = operand.index, kernel.widths[operand.index], WIDTH[kind], DTYPE[kind]
    if held == wanted:
        if dtype in (UNSIGNED[held], np.bool_):
            return lambda m: m.registers[index]
        return lambda m: m.registers[index].view(dtype)
    if held < wanted:
        raise Unsupported(f"a register of {held} bytes as {kind}")
    return lambda m: m.registers[index].astype(UNSIGNED[wanted]).view(dtype)


def _symbol(name, kind, kernel):
    if name.startswith("%"):
        return lambda m: m.special[name].astype(DTYPE[kind])
    if name in kernel.shared:
        value = constant(SHARED_BASE + kernel.shared[name], kind)
    elif name in kernel.local:
        value = constant(LOCAL_BASE + kernel.local[name], kind)
    else:
        names = [parameter.name for parameter in kernel.parameters]
        if name not in names:
            raise Unsupported(f"symbol {name}")
        value = constant(PARAMETER_BASE + 256 * names.index(name), kind)
    return lambda m: value


def destination(operand, kernel: Kernel) -> Callable:
    """A function (machine, value, mask) that keeps ``value``, widened by its own sign if the register is wider."""
    if operand == SINK:
        return lambda m, value, mask: None
    index, width = operand.index, kernel.widths[operand.index]
    dtype = UNSIGNED[width]

    def keep(m, value, mask):
        if value.dtype != dtype:
            value = value.view(dtype) if value.dtype.itemsize == width else value.astype(dtype)
        if mask is not None:
            value = np.where(mask, value, m.registers[index])
        m.registers[index] = value

    return keep


def sources(instruction: Instruction, kinds: list[str], kernel: Kernel) -> list[Callable]:
    """Of all operands but the first, the result."""
    return [source(o, kind, kernel) for o, kind in zip(instruction.operands[1:], kinds, strict=True)]


def elementwise(instruction: Instruction, kernel: Kernel, kinds: list[str], function: Callable) -> Callable:
    """The common case: ``function`` of the sources, lane by lane."""
    keep = destination(instruction.operands[0], kernel)
    reads = sources(instruction, kinds, kernel)
    if len(reads) == 1:
        (a,) = reads
        return lambda m, mask: keep(m, function(a(m)), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda m, mask: keep(m, function(a(m), b(m)), mask)
    return lambda m, mask: keep(m, function(*[read(m) for read in reads]), mask)


def vector_of(operand) -> tuple:
    """The parts of a vector, or the one operand."""
    return operand.parts if isinstance(operand, Vector) else (operand,)


def access(instruction: Instruction) -> tuple[str, int]:
    """(type of an element, elements) of a load or store."""
    count = next((int(part[1:]) for part in instruction.parts if part in ("v2", "v4", "v8")), 1)
    return instruction.parts[-1], count


def address_of(operand, kind: str, kernel: Kernel) -> Callable:
    """A function of the machine that gives the addresses ``[base + offset]``."""
    read = source(operand.base, kind, kernel)
    if not operand.offset:
        return read
    offset = constant(operand.offset, kind)
    return lambda m: read(m) + offset
