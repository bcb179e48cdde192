"""Machine instructions that the warps of an executed kernel would issue: those that ptxas makes of its PTX, as often as
the executor went through the PTX that each was made of.

ptxas writes down for each machine instruction the line that it comes from, and makes the same code where it does. Lines
of Triton's own source are replaced by those of the PTX.
"""

from __future__ import annotations

import collections
import itertools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .executor.syntax import Kernel
from .machine_code import Instruction, instructions, tool

# By the beginning of a mnemonic; what is in no class computes with integers or moves what is in registers.
CLASSES = {
    "matrix": ("IMMA", "HMMA", "IGMMA", "HGMMA", "QMMA"),
    "global memory": ("LDG", "STG", "LDGSTS", "ATOMG", "RED", "UTMALDG", "UTMASTG"),
    "shared memory": ("LDS", "STS", "LDSM", "STSM", "ATOMS"),
    "local memory": ("LDL", "STL"),
    "fp32": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSETP", "FCHK", "MUFU", "FRND"),
    "fp16": ("HADD2", "HMUL2", "HFMA2", "HMNMX2", "HSETP2"),
    "conversions": ("F2F", "F2I", "I2F", "F2FP", "I2FP", "F2IP", "I2IP"),
    "control": (
        *("BRA", "EXIT", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "WARPSYNC", "ELECT", "VOTE", "PLOP3", "PREEXIT"),
        *("BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "SYNCS", "MEMBAR", "ERRBAR", "FENCE", "CCTL", "ACQBULK"),
        *("UCGABAR_ARV", "UCGABAR_WAIT", "USETMAXREG"),
    ),
}
_CLASS_OF = {mnemonic: name for name, mnemonics in CLASSES.items() for mnemonic in mnemonics}
OTHER = "integers and moves"
_SECTION = re.compile(r"^\s*\.section\b", re.M)
_LABEL = re.compile(r"\.L_x_\d+:")
_SAYS_LINE = re.compile(r'^\s*//## File "[^"]*", line (\d+)')
# Of PTX that becomes as many machine instructions of one kind: how many there are of one line says how often ptxas has
# written a loop's turn.
_ONE_TO_ONE = ("mma", "ldmatrix", "ld", "st", "cp")
_TOUCHES_MEMORY = re.compile(r"(LDG|STG|LDGSTS|LDS|STS|LDSM|STSM|LDL|STL|IMMA|HMMA)\b")


@dataclass(frozen=True)
class Assembled:
    """What ptxas makes of a kernel.

    Attributes:
        pieces: basic blocks of (machine instruction, line of the PTX that it was made of), in order.
        registers: of a thread.
    """

    pieces: list[list[tuple[Instruction, int]]]
    registers: int


def with_lines(text: str) -> str:
    """The PTX with each statement marked by its line."""
    end = _SECTION.search(text)
    lines = (text[: end.start()] if end else text).split("\n")
    inside, marked = False, []
    for number, line in enumerate(lines, 1):
        statement = line.strip()
        if re.match(r"\.(loc|file)\b", statement):
            continue
        if inside and re.match(r"[@a-z]", statement):
            marked.append(f".loc 1 {number} 0")
        inside |= statement == "{"
        marked.append(re.sub(r"^(\.target\s+\w+),\s*debug", r"\1", line))
    return "\n".join([*marked, '.file 1 "kernel.ptx"', ""])


# Triton's ptxas for architectures before Blackwell reads PTX up to this version; nvcc writes later ones.
_OLDER_READS = (8, 7)


def assemble(text: str) -> Assembled:
    """By the ptxas that Triton takes for the PTX's target, or for a version that this one does not read its later one.

    Raises:
        subprocess.CalledProcessError: if it refuses.
    """
    with tempfile.TemporaryDirectory() as directory:
        source, made = Path(directory, "kernel.ptx"), Path(directory, "kernel.cubin")
        source.write_text(with_lines(text))
        target = re.search(r"^\.target\s+(\w+)", text, re.M).group(1)
        version = tuple(map(int, re.search(r"^\.version\s+(\d+)\.(\d+)", text, re.M).groups()))
        is_older = version <= _OLDER_READS and int(re.search(r"\d+", target).group()) < 100
        command = [
            tool("ptxas" if is_older else "ptxas-blackwell"),
            "-lineinfo",
            "-v",
            f"-arch={target}",
            source,
            "-o",
            made,
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [tool("nvdisasm"), "-g", "-c", made]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Assembled(_pieces(listing), int(re.search(r"Used (\d+) registers", said).group(1)))


def _pieces(listing: str) -> list[list[tuple[Instruction, int]]]:
    pieces: list[list[tuple[Instruction, int]]] = [[]]
    line = 0
    for row in listing.split("\n"):
        if found := _SAYS_LINE.match(row):
            line = int(found.group(1))
        if _LABEL.match(row):
            pieces.append([])
        for instruction in instructions(row):
            pieces[-1].append((instruction, line))
            if instruction.name in ("BRA", "EXIT", "RET"):
                pieces.append([])
    return [piece for piece in pieces if piece]


def issued(assembled: Assembled, kernel: Kernel, entered: Mapping[int, int]) -> collections.Counter[str]:
    """Machine instructions by the first word of their names, of all warps together.

    Those of memory and matrix units run as often as PTX's, of which each becomes one or is joined to another. Of the
    others, a basic block of machine code is taken to run as often as the block of PTX that most of it was made of: what
    ptxas moved in from elsewhere runs where it stands. Where ptxas has written a turn of a loop several times, they
    share its turns, if the loop touches memory or multiplies matrices: how often is told by that.

    Args:
        kernel: the PTX, as it was executed.
        entered: blocks of it, by number, and how often warps ran through each.
    """
    block_of = {step.line: number for number, block in enumerate(kernel.blocks) for step in block}
    once = {step.line for block in kernel.blocks for step in block if step.parts[0] in _ONE_TO_ONE}
    copies: dict[int, int] = collections.defaultdict(lambda: 1)
    every = itertools.chain.from_iterable(assembled.pieces)
    of_line = collections.Counter(line for made, line in every if line in once and _TOUCHES_MEMORY.match(made.text))
    for line, count in of_line.items():
        copies[block_of[line]] = max(copies[block_of[line]], count)
    found: collections.Counter[str] = collections.Counter()
    for piece in assembled.pieces:
        votes = collections.Counter(block_of[line] for _, line in piece if line in block_of)
        if not votes:
            continue  # padding behind the end
        block = votes.most_common(1)[0][0]
        for instruction, line in piece:
            if instruction.name == "NOP":  # fills up the end
                continue
            name = instruction.name.split(".")[0]
            if line in of_line and _TOUCHES_MEMORY.match(instruction.text):
                found[name] += entered.get(block_of[line], 0) / of_line[line]
            else:
                found[name] += entered.get(block, 0) / copies[block]
    return found


def by_class(instructions: Mapping[str, float]) -> collections.Counter[str]:
    """What :func:`issued` gives, by :data:`CLASSES` and :data:`OTHER`."""
    found: collections.Counter[str] = collections.Counter()
    for name, count in instructions.items():
        found[_CLASS_OF.get(name, OTHER)] += count
    return found
