"""A kernel translated: for each instruction what runs, made once from the table of opcodes."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass

from .faults import Unsupported
from .opcodes import BUILDERS
from .operands import access
from .spelling import is_known
from .syntax import WIDTH, Kernel


class Steps(list):
    """One block: (what runs, guard, whether the guard is negated, instruction).

    Attributes:
        number: its place in the program.
        opcodes: how often each is executed.
        issues: the same by the names that are counted (:func:`_counted_as`).
        waits: of these, those for groups of copies or products: (of what, how many groups may be left in flight).
        gathers: whether a warp's lanes wait for each other in it.
        has_matrix_fence: whether there is a wgmma.fence.
        touched_last: registers that other instructions name behind the last wgmma.fence, or in all of the block.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.opcodes: dict[str, int] = {}
        self.issues: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[tuple[str, int]] = collections.Counter()
        self.gathers = False
        self.has_matrix_fence = False
        self.touched_last: frozenset[int] = frozenset()


@dataclass
class Program:
    """Attributes:
    grain: the fewest bytes of shared memory that an instruction reads or writes at once.
    has_mbarriers, has_matrices: whether there are any, and any wgmma.
    """

    kernel: Kernel
    blocks: list[Steps]
    grain: int
    has_mbarriers: bool
    has_matrices: bool


_OF_WHOLE_WARPS = {"shfl", "redux", "elect", "mma", "ldmatrix", "stmatrix", "bar", "barrier", "setmaxnreg"}
_OF_SEVERAL_KINDS = {"ld", "st", "wgmma", "mbarrier"}
_ELEMENT_BYTES = {"ldmatrix": 4, "mbarrier": 8}


def _grain(instruction) -> int:
    """Bytes of shared memory that one lane of the instruction reads or writes at once."""
    kind, parts = instruction.parts[0], instruction.parts
    if kind in ("ld", "st", "atom", "red") and not any(part in ("global", "param", "local") for part in parts):
        element, count = access(instruction)
        return WIDTH[element] * count
    if kind == "cp" and "bulk" not in parts and len(instruction.operands) > 2:
        return instruction.operands[2].bits
    if kind in ("ldmatrix", "stmatrix"):
        return 2 if "trans" in parts else 4
    return _ELEMENT_BYTES.get(kind, 16)


def _counted_as(instruction) -> str:
    """What a profiler's reader would look for: the opcode, of some with the word behind it that says which."""
    kind, *rest = instruction.parts
    return f"{kind}.{rest[0].partition('::')[0]}" if kind in _OF_SEVERAL_KINDS else kind


def _waits_for(instruction) -> tuple[str, int] | None:
    kind, *rest = instruction.parts
    if kind not in ("cp", "wgmma") or not any(part.startswith("wait") for part in rest):
        return None
    return kind, instruction.operands[0].bits if "wait_group" in rest else 0


def _translate(instruction, kernel, end: int) -> Callable | None:
    kind = instruction.parts[0]
    if kind in ("bra", "ret", "exit"):
        if kind != "bra":
            instruction.target = end
        return None
    if not is_known(instruction.opcode) or (kind == "brx" and instruction.guard):
        raise Unsupported(instruction.text)
    if kind == "brx":
        return None
    return BUILDERS[kind](instruction, kernel)


def translate(kernel: Kernel) -> Program:
    """The program that a machine runs. Raises Unsupported for what is not implemented."""
    blocks, has_mbarriers, has_matrices = [], False, False
    grain = 16
    multiplies = any(instruction.parts[0] == "wgmma" for block in kernel.blocks for instruction in block)
    for block in kernel.blocks:
        steps, touched, fenced = Steps(len(blocks)), set(), False
        for instruction in block:
            kind = instruction.parts[0]
            steps.opcodes[kind] = steps.opcodes.get(kind, 0) + 1
            steps.issues[_counted_as(instruction)] += 1
            if wait := _waits_for(instruction):
                steps.waits[wait] += 1
            grain = min(grain, _grain(instruction))
            steps.gathers |= kind in _OF_WHOLE_WARPS
            has_mbarriers |= kind == "mbarrier"
            if kind == "wgmma":
                if instruction.parts[1] == "fence":
                    touched, fenced = set(), True
                else:
                    has_matrices = True
                    instruction.fresh, instruction.fenced = frozenset(touched), fenced
            elif multiplies:
                touched |= instruction.registers
            guard = instruction.guard.index if instruction.guard else None
            run = _translate(instruction, kernel, len(kernel.blocks))
            steps.append((run, guard, instruction.guard_is_negated, instruction))
        steps.has_matrix_fence, steps.touched_last = fenced, frozenset(touched)
        blocks.append(steps)
    return Program(kernel, blocks, grain, has_mbarriers, has_matrices)
