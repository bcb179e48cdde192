"""What PTX text is made of: registers, operands, instructions, and a kernel as basic blocks of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

# Bytes of each type; predicates are kept as one boolean.
WIDTH = {kind + str(bits): bits // 8 for bits in (8, 16, 32, 64) for kind in "bsu"}
WIDTH |= {"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f32x2": 8, "f64": 8, "pred": 0, "b128": 16}
WIDTH |= {"s16x2": 4, "u16x2": 4}
# Opcodes whose first operand is no result.
WITHOUT_RESULT = frozenset(
    (
        *("st", "bar", "barrier", "bra", "brx", "ret", "exit", "cp", "fence", "membar", "red"),
        *("prefetch", "trap", "setmaxnreg"),
    )
)


class PtxError(Exception):
    """The text is not PTX that this reader knows."""


@dataclass(frozen=True)
class Register:
    index: int


@dataclass(frozen=True)
class Immediate:
    """``bits`` of a float literal (then ``is_float``), or an integer of either sign."""

    bits: int
    is_float: bool = False


@dataclass(frozen=True)
class Symbol:
    """A special register (``%tid.x``), a parameter or a shared array."""

    name: str


@dataclass(frozen=True)
class Not:
    """A negated predicate."""

    of: Register


@dataclass(frozen=True)
class Vector:
    parts: tuple


@dataclass(frozen=True)
class Address:
    base: object
    offset: int = 0
    coordinates: tuple = ()


@dataclass(frozen=True)
class Pair:
    """``a|b``: two results."""

    first: object
    second: object


SINK = Symbol("_")


def registers_in(operands) -> Iterator[int]:
    """Numbers of the registers that operands name, however deep."""
    for operand in operands:
        if isinstance(operand, Register):
            yield operand.index
            continue
        if isinstance(operand, Immediate | Symbol):
            continue
        for name in ("parts", "base", "coordinates", "first", "second", "of"):
            inner = getattr(operand, name, ())
            yield from registers_in(inner if isinstance(inner, tuple) else (inner,))


@dataclass
class Instruction:
    """Attributes:
    opcode: with its modifiers; ``parts`` are these, apart.
    guard: the predicate that it depends on, or None; ``guard_is_negated``.
    target: the block that a branch leads to; the blocks of a table, of which the operand of ``brx.idx`` picks one.
    line: of the text in which it begins, from 1.
    fresh: of wgmma, the registers that its block has touched before it; behind the last wgmma.fence if there has been
        one in the block (``fenced``).
    """

    opcode: str
    operands: list
    guard: Register | None
    guard_is_negated: bool
    text: str
    target: int | np.ndarray | None = None
    line: int = 0
    fresh: frozenset[int] = frozenset()
    fenced: bool = False
    parts: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        self.parts = tuple(self.opcode.split("."))

    @functools.cached_property
    def registers(self) -> frozenset[int]:
        """All that it names."""
        return frozenset(registers_in([self.guard, *self.operands]))

    @functools.cached_property
    def results(self) -> frozenset[int]:
        """The registers that it writes."""
        first = self.operands[:1]
        if self.parts[0] in WITHOUT_RESULT or (first and isinstance(first[0], Address)):
            return frozenset()
        return frozenset(registers_in(first))


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str
    size: int


@dataclass
class Kernel:
    """One entry.

    Attributes:
        threads: of a thread block; None where the launch says so.
        blocks: basic blocks; they end where control may leave, join or wait. Block ``len(blocks)`` is the end.
        widths, names: bytes (0 of predicates) and name of each register.
        shared: offset of each named array in shared memory; those of unknown size lie behind all others.
        static_shared: bytes of the arrays of known size.
        local: bytes of each thread's own memory.
        cluster: thread blocks of a cluster, along x; None where the launch says so.
        registers: of a thread at first; None where the assembler says so.
    """

    name: str
    parameters: list[Parameter]
    threads: int | None
    blocks: list[list[Instruction]]
    widths: list[int]
    names: list[str]
    shared: dict[str, int]
    static_shared: int = 0
    local: dict[str, int] = field(default_factory=dict)
    local_bytes: int = 0
    cluster: int | None = None
    registers: int | None = None
