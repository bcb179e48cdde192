"""``ditq inspect``: every shipped form of every kernel, compiled for architectures that need not be present, and held
to what its machine code must be.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from triton.compiler import CompiledKernel

from ..kernels.config import family, shared_memory
from .compilation import Variant, compile_variant, load
from .machine_code import MACS_PER_CLOCK, UNKNOWN_RATES, MachineCode, read
from .shipped import variants
from .workers import end_with_parent

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
RELATIVES = (103, 121)  # inspected when asked for: of the families of 100 and 120, whose rules they share
FORMS_AT_ONCE = 8  # that a process compiles, and then disassembles together
QUICK_EVERY = 8  # form of a family of architectures that a quick inspection takes
# The matrix instructions of int8 and of 16-bit operands, by family: mma.sync, and Hopper's wgmma. Datacenter
# Blackwell's tcgen05 has no int8 form that Triton uses, and wants tiles of at least 64 rows a warpgroup.
MATRIX_INSTRUCTIONS: dict[int, dict[str, tuple[str, ...]]] = {
    8: {"int8": ("IMMA",), "float": ("HMMA",)},
    9: {"int8": ("IGMMA",), "float": ("HGMMA",)},
    10: {"int8": ("IMMA",), "float": ("UTCHMMA",)},
    12: {"int8": ("IMMA",), "float": ("HMMA",)},
}


MOST_MATRIX_WAITS = 4  # of one turn of a loop: one behind each product of a block's parts


def failures(variant: Variant, code: MachineCode) -> list[str]:
    """What is wrong with the machine code of ``variant``, a clause each; empty if nothing is."""
    wrong = []
    if code.spills:
        wrong.append(f"{code.spills} spill instructions")
    if code.shared > code.shared_limit:
        wrong.append(f"{code.shared} B of shared memory, more than {code.shared_limit}")
    found = {instruction.split(".")[0] for instruction in code.matrix_instructions}
    wanted = set(MATRIX_INSTRUCTIONS[family(code.arch)][variant.matrix]) if variant.matrix else set()
    if found != wanted:
        wrong.append(f"matrix instructions {sorted(found) or 'none'}, not {sorted(wanted) or 'none'}")
    if variant.decodes and family(code.arch) == 9 and code.left_operand != "registers":
        wrong.append("the decoded weight does not come from registers")
    if variant.issue_budget and code.issue_slots is not None and code.issue_slots > variant.issue_budget:
        wrong.append(f"{code.issue_slots} issue slots per matrix clock, more than {variant.issue_budget}")
    if variant.issue_budget and code.issue_slots is None and None not in MACS_PER_CLOCK.get(code.arch, UNKNOWN_RATES):
        wrong.append("its main loop was not recognised")
    if code.mixed_operands:
        wrong.append(f"{code.mixed_operands} pieces of assembly decode bytes of several groups by one")
    if code.matrix_waits and code.matrix_waits > MOST_MATRIX_WAITS:
        wrong.append(f"{code.matrix_waits} waits for matrix instructions in a turn of the loop: they are serialized")
    if variant.in_flight and code.idle_waits != 0:
        found = "no loop was recognised" if code.idle_waits is None else f"{code.idle_waits} waits in its loop do not"
        wrong.append(f"a matrix product is to stay in flight: {found}")
    if code.driver_registers not in (None, code.registers):
        wrong.append(f"the driver gives it {code.driver_registers} registers, not {code.registers}")
    if code.driver_spills:
        wrong.append(f"the driver gives it {code.driver_spills} words of thread-local memory")
    return wrong


@dataclasses.dataclass(frozen=True)
class Finding:
    """The machine code of one form, and what is wrong with it."""

    code: MachineCode
    failures: tuple[str, ...]


def _not_compiled(variant: Variant, arch: int, reason: str) -> Finding:
    code = MachineCode(variant.name, arch, 0, 0, 0, shared_memory(arch), (), None, None, None)
    return Finding(code, (f"did not compile: {reason}",))


def inspect_variants(every: Sequence[Variant], arch: int, driver: bool = False) -> list[Finding]:
    """Compile forms for ``arch``, read and judge them.

    Args:
        driver: load them on the current GPU, which is of ``arch``, as well.
    """
    compiled: dict[str, CompiledKernel] = {}
    refused: dict[str, Finding] = {}
    for variant in every:
        try:
            compiled[variant.name] = compile_variant(variant, arch)
        except Exception as error:  # a compiler's: the finding says so
            refused[variant.name] = _not_compiled(variant, arch, _said(error))
    chosen = [variant for variant in every if variant.name in compiled]
    try:
        codes = read(chosen, arch, [compiled[variant.name] for variant in chosen])
    except Exception as error:  # the disassembler's
        return [refused.get(variant.name) or _not_compiled(variant, arch, _said(error)) for variant in every]
    read_of = {code.name: code for code in codes}
    return [
        refused.get(variant.name) or _judged(variant, read_of[variant.name], compiled[variant.name], driver)
        for variant in every
    ]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[-300:]  # Triton's begin with the kernel's source


def _judged(variant: Variant, code: MachineCode, compiled: CompiledKernel, driver: bool) -> Finding:
    if driver:
        try:
            registers, spills = load(compiled)
        except Exception as error:
            return _not_compiled(variant, code.arch, _said(error))
        code = dataclasses.replace(code, driver_registers=registers, driver_spills=spills)
    return Finding(code, tuple(failures(variant, code)))


def _inspect_places(where: Sequence[int], arch: int, driver: bool) -> list[Finding]:
    """The forms of ``arch`` in these places: numbers cross to another process where kernels could not."""
    every = list(variants(arch))
    return inspect_variants([every[place] for place in where], arch, driver)


def places(arch: int, quick: bool = False) -> list[int]:
    """Which forms of ``arch`` are inspected: all; or every eighth, by one of the architectures of its family, of which
    the first takes those with a budget of instructions too, where there is a rate to hold it against.
    """
    relatives = [one for one in ARCHITECTURES if family(one) == family(arch)] or [arch]
    first = relatives.index(arch) * QUICK_EVERY if arch in relatives else 0
    budgets = arch == relatives[0] and None not in MACS_PER_CLOCK.get(arch, UNKNOWN_RATES)
    return [
        place
        for place, variant in enumerate(variants(arch))
        if not quick
        or place % (QUICK_EVERY * len(relatives)) == first
        or (budgets and variant.issue_budget is not None)
    ]


def _batches(places: Sequence[int], size: int) -> list[Sequence[int]]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def count(architectures: Iterable[int], quick: bool = False) -> int:
    """How many findings :func:`inspect` yields."""
    return sum(len(places(arch, quick)) for arch in architectures)


def inspect(
    architectures: Iterable[int], workers: int | None = None, driver: bool = False, quick: bool = False
) -> Iterator[Finding]:
    """Findings of every shipped form, or of the :func:`places` that are ``quick``, for ``architectures`` (10 * major +
    minor), in order, compiled by ``workers`` processes (default: one a core). A form that ends its compiler's process
    is a finding too.
    """
    jobs = [(some, arch, driver) for arch in architectures for some in _batches(places(arch, quick), FORMS_AT_ONCE)]
    workers = workers or os.cpu_count() or 1
    environment = os.environ.pop("TRITON_INTERPRET", None)  # the workers compile, whatever this process does
    try:
        while jobs:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
                try:
                    for findings in pool.map(_inspect_places, *zip(*jobs, strict=True)):
                        del jobs[0]
                        yield from findings
                except BrokenProcessPool:
                    if workers == 1 and len(jobs[0][0]) == 1:
                        (place,), arch, _ = jobs.pop(0)
                        yield _not_compiled(list(variants(arch))[place], arch, "the compiler's process ended")
                    else:  # of several at work nobody knows which it was
                        workers, jobs = 1, [([place], arch, driver) for some, arch, driver in jobs for place in some]
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment


def line(finding: Finding) -> str:
    """The finding as a row of a table."""
    code = finding.code
    loop = "-" if code.loop_instructions is None else str(code.loop_instructions)
    slots = "-" if code.issue_slots is None else f"{code.issue_slots:.2f}"
    matrix = " ".join(code.matrix_instructions) or "-"
    operand = f" ({code.left_operand})" if code.left_operand else ""
    verdict = "ok" if not finding.failures else "FAILS: " + "; ".join(finding.failures)
    return (
        f"sm_{code.arch:<4}{code.name:62}{code.registers:5}{code.spills:7}{code.shared:8}{loop:>6}{slots:>7}  "
        f"{matrix}{operand}  {verdict}"
    )


HEADER = f"{'arch':7}{'kernel':62}{'regs':>5}{'spills':>7}{'shared':>8}{'loop':>6}{'slots':>7}  matrix instruction"
