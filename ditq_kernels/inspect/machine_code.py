"""Read a compiled kernel's machine code; the disassembler comes with Triton."""

from __future__ import annotations

import bisect
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

from ..kernels.config import shared_memory
from .compilation import Variant
from .packed_operands import disagreeing_calls

# Dense multiply-accumulates per clock and multiprocessor of the instructions that the kernels use, (int8, 16-bit), from
# the whitepapers' peak rates; None where the instruction is not the architecture's fast path and its rate unpublished.
# Of 86: GA102 whitepaper 2.0, RTX A6000 and A40; GeForce boards sum 16-bit products in fp32 at half that rate.
MACS_PER_CLOCK: dict[int, tuple[int | None, int | None]] = {
    80: (2048, 1024),
    86: (1024, 512),
    89: (1024, 512),
    90: (4096, 2048),
    100: (None, 4096),
    120: (1024, 512),
}
UNKNOWN_RATES = (None, None)
SCHEDULERS = 4  # of a multiprocessor, each issuing one instruction of a warp per clock
WARPGROUP_WARPS = 4
# The tensor cores' integer (I) and 16-bit (H) instructions: mma.sync, wgmma (G) and tcgen05 (UTC).
_MATRIX = re.compile(r"^(UTC[IHQ]MMA|[IHQ]GMMA|[IHQ]MMA)\b")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?)([A-Z][^;]*);")


@dataclass(frozen=True)
class MachineCode:
    """What the machine code of a :class:`.compilation.Variant` says.

    Attributes:
        registers: per thread.
        spills: instructions that read or write thread-local memory.
        shared: bytes of shared memory per thread block; ``shared_limit``: what the architecture has.
        matrix_instructions: mnemonics of the matrix instructions, in order of appearance.
        left_operand: where the matrix instructions take their left operand from: "registers" if all of them do,
            "shared" if any takes it from there, or None.
        loop_instructions: in one turn of the loop around the matrix instructions; None without such a loop.
        issue_slots: issue slots per matrix clock, ``loop_instructions * warps / 4 / matrix_clocks``: the clocks that
            the four schedulers of a multiprocessor take to issue one turn of the loop, over those that its matrix units
            take to compute it, the loop's multiply-accumulates over the architecture's rate (:data:`MACS_PER_CLOCK`).
            Below 1 the matrix units can be the limit; None where the rate or the instruction's size is unknown.
        matrix_waits: how often one turn of the loop waits for matrix instructions of warpgroups; None without a loop.
            ptxas makes each wait for the one before it where it finds that their registers are touched between.
        idle_waits: of these waits, in all innermost loops around matrix instructions, those that leave none in flight;
            None without such a loop.
        driver_registers, driver_spills: registers per thread, and words of thread-local memory, that a driver gave the
            kernel when it loaded it; None where none did.
        mixed_operands: pieces of assembly that read one operand for elements that have others
            (:func:`.packed_operands.disagreeing_calls`).
    """

    name: str
    arch: int
    registers: int
    spills: int
    shared: int
    shared_limit: int
    matrix_instructions: tuple[str, ...]
    left_operand: str | None
    loop_instructions: int | None
    issue_slots: float | None
    matrix_waits: int | None = None
    driver_registers: int | None = None
    driver_spills: int | None = None
    mixed_operands: int = 0
    idle_waits: int | None = None


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    predicated: bool
    text: str

    @property
    def name(self) -> str:
        return self.text.split()[0]

    @property
    def is_matrix(self) -> bool:
        return _MATRIX.match(self.text) is not None

    @property
    def branch_target(self) -> int | None:
        found = re.match(r"BRA\b.*?(0x[0-9a-f]+)", self.text)
        return int(found.group(1), 16) if found else None

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of a matrix instruction: per warp, of wgmma per warpgroup; None if it does not say."""
        wide = re.match(r"[IHQ]GMMA\.(\d+)x(\d+)x(\d+)", self.text)
        if wide:
            m, n, k = map(int, wide.groups())
            return m * n * k
        narrow = re.match(r"[IHQ]MMA\.(16)(8)(\d+)", self.text)
        if narrow:
            m, n, k = map(int, narrow.groups())
            return m * n * k
        return None

    @property
    def left_operand(self) -> str | None:
        """ "registers" or "shared" of a wgmma; mma.sync always takes registers; tcgen05 is not read."""
        if re.match(r"[IHQ]GMMA", self.text):
            return "registers" if re.match(r"\S+ R\d+, R\d+", self.text) else "shared"
        return "registers" if re.match(r"[IHQ]MMA", self.text) else None


def instructions(listing: str) -> list[Instruction]:
    """The instructions of a disassembler's listing, in order."""
    return [Instruction(int(at, 16), bool(guard), text) for at, guard, text in _INSTRUCTION.findall(listing)]


def main_loop(code: list[Instruction]) -> list[Instruction] | None:
    """One turn of the loop around the matrix instructions: from the target of the first backward branch that spans
    some, to that branch. Stretches that a conditional branch can skip and that hold no matrix instruction are left
    out: in a persistent kernel they are the epilogue, which runs once a tile.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    for end, instruction in enumerate(code):
        start = index.get(instruction.branch_target, end + 1)
        if start > end or not any(inside.is_matrix for inside in code[start : end + 1]):
            continue
        turn, i = [], start
        while i <= end:
            turn.append(code[i])
            target = index.get(code[i].branch_target, 0)
            skips = code[i].predicated and i < target <= end and not any(x.is_matrix for x in code[i + 1 : target])
            i = target if skips else i + 1
        return turn
    return None


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The shortest loop around each matrix instruction, from the target of its backward branch to that branch. Longer
    ones may begin inside of it: waits that seldom happen stand behind all other code, and lead back.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    spans = [(index.get(one.branch_target, end + 1), end) for end, one in enumerate(code)]
    backward = sorted((span for span in spans if span[0] <= span[1]), key=lambda span: span[1] - span[0])
    matrix = [place for place, instruction in enumerate(code) if instruction.is_matrix]
    around = (next((span for span in backward if span[0] <= place <= span[1]), None) for place in matrix)
    return [code[start : end + 1] for start, end in dict.fromkeys(filter(None, around))]


def issue_slots(turn: list[Instruction], warps: int, arch: int) -> float | None:
    """See :attr:`MachineCode.issue_slots`."""
    matrix = [instruction for instruction in turn if instruction.is_matrix]
    rates = MACS_PER_CLOCK.get(arch, UNKNOWN_RATES)
    rate = rates["IH".index(matrix[0].name[0])] if matrix[0].name[0] in "IH" else None
    macs = [instruction.macs for instruction in matrix]
    if rate is None or None in macs:
        return None
    groups = warps / WARPGROUP_WARPS if "GMMA" in matrix[0].name else warps
    return round(len(turn) * warps / SCHEDULERS / (sum(macs) * groups / rate), 3)


def tool(name: str) -> Path:
    """A program that comes with Triton."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _run(name: str, *options: str) -> str:
    return subprocess.run([tool(name), *options], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run("cuobjdump", "-res-usage", file.name)


def _binary(cubin: bytes) -> bytes:
    """The instructions of the one kernel in a cubin, which is an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * number) for number in range(count)]
    names_begin = sections[names][4]
    for name, _, _, _, begin, length in sections:
        if cubin.startswith(b".text.", names_begin + name):
            return cubin[begin : begin + length]
    raise ValueError("the compiler's file holds no kernel")


def disassemble(cubins: Sequence[bytes], arch: int) -> list[list[Instruction]]:
    """The instructions of each kernel. One disassembly of all: it takes half a second to begin one."""
    binaries = [_binary(cubin) for cubin in cubins]
    found: list[list[Instruction]] = [[] for _ in cubins]
    if binaries:
        ends = list(itertools.accumulate(map(len, binaries)))
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"".join(binaries))
            file.flush()
            listing = _run("nvdisasm", "--binary", f"SM{arch}{'a' if arch >= 90 else ''}", file.name)
        for instruction in instructions(listing):
            found[bisect.bisect(ends, instruction.address)].append(instruction)
    return found


def left_operand(matrix: list[Instruction]) -> str | None:
    """See :attr:`MachineCode.left_operand`."""
    places = {instruction.left_operand for instruction in matrix}
    return "shared" if "shared" in places else next(iter(places), None)


def read(variants: Sequence[Variant], arch: int, compiled: Sequence[CompiledKernel]) -> list[MachineCode]:
    """What the machine code of each of ``variants`` says, which were compiled for ``arch`` (10 * major + minor)."""
    resources = [_resources(one.asm["cubin"]) for one in compiled]
    # Without a stack nothing is spilled, and without a matrix product nothing else is asked.
    listed = [
        variant.matrix is not None or variant.issue_budget is not None or "STACK:0 " not in used
        for variant, used in zip(variants, resources, strict=True)
    ]
    codes = iter(disassemble([one.asm["cubin"] for one in itertools.compress(compiled, listed)], arch))
    return [
        _read(variant, arch, one, used, next(codes) if is_listed else [])
        for variant, one, used, is_listed in zip(variants, compiled, resources, listed, strict=True)
    ]


def _idle_waits(code: list[Instruction]) -> int | None:
    """See :attr:`MachineCode.idle_waits`."""
    loops = innermost_loops(code)
    every = (instruction.text for loop in loops for instruction in loop)
    return sum(re.match(r"WARPGROUP\.DEPBAR\.LE gsb\d, 0x0\b", text) is not None for text in every) if loops else None


def _read(
    variant: Variant, arch: int, compiled: CompiledKernel, resources: str, code: list[Instruction]
) -> MachineCode:
    matrix = [instruction for instruction in code if instruction.is_matrix]
    turn = main_loop(code)
    return MachineCode(
        name=variant.name,
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", resources).group(1)),
        spills=sum(instruction.name.split(".")[0] in ("LDL", "STL") for instruction in code),
        shared=compiled.metadata.shared,
        shared_limit=shared_memory(arch),
        matrix_instructions=tuple(dict.fromkeys(instruction.name for instruction in matrix)),
        left_operand=left_operand(matrix),
        loop_instructions=len(turn) if turn else None,
        issue_slots=issue_slots(turn, variant.options.get("num_warps", 4), arch) if turn else None,
        matrix_waits=sum(instruction.name == "WARPGROUP.DEPBAR.LE" for instruction in turn) if turn else None,
        mixed_operands=len(disagreeing_calls(compiled.asm["llir"])),
        idle_waits=_idle_waits(code),
    )
