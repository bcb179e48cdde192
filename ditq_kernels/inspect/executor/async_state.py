"""What is on its way: copies by cp.async, and matrix instructions of warpgroups, in groups that are waited for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .faults import WARPGROUP, Fault
from .program import Steps
from .syntax import Instruction


@dataclass
class Copy:
    """A cp.async on its way: ``groups`` are the lanes' numbers of the group that it belongs to."""

    lanes: np.ndarray
    groups: np.ndarray
    index: np.ndarray
    width: int
    values: np.ndarray

    def part(self, which: np.ndarray) -> Copy:
        return Copy(self.lanes[which], self.groups[which], self.index[which], self.width, self.values[which])


class CopyGroups:
    """cp.async of every thread of a :class:`.machine.Machine`: a thread's groups arrive in the order in which it closed
    them.
    """

    def __init__(self, machine) -> None:
        self.machine = machine
        self.copies: list[Copy] = []
        self.open = np.zeros(machine.lanes, np.int64)

    def start(self, lanes: np.ndarray, index: np.ndarray, width: int, values: np.ndarray) -> None:
        self.machine.shared.start_copy(index, width, lanes)
        self.copies.append(Copy(lanes, self.open[lanes], index, width, values))

    def commit(self, mask: np.ndarray | None) -> None:
        self.open[self.machine.chosen(mask)] += 1

    def wait(self, newest: int | None, mask: np.ndarray | None) -> None:
        """All groups of the threads but the ``newest`` arrive; None: what no group was made of as well."""
        waiting = np.zeros(self.machine.lanes, np.bool_)
        waiting[self.machine.chosen(mask)] = True
        left = []
        for copy in self.copies:
            here = waiting[copy.lanes]
            if newest is not None:
                here = here & (copy.groups < self.open[copy.lanes] - newest)
            if here.any():
                done = copy.part(here)
                self.machine.shared.arrive(done.index, done.width, done.values, done.lanes)
            if not here.all():
                left.append(copy.part(~here))
        self.copies = left

    def finish(self) -> None:
        if self.copies:
            raise Fault("the kernel ends before copies that nobody waited for")


@dataclass
class Flight:
    """A matrix instruction on its way: for each warpgroup, the group that it belongs to (0: not this one's)."""

    groups: np.ndarray
    sums: frozenset[int]
    operands: frozenset[int]


class MatrixGroups:
    """wgmma of every warpgroup: until a group was waited for, its sums may not be touched, nor the registers that it
    reads be overwritten. Registers that others have touched since the last wgmma.fence may not enter one, nor may any
    before the first.

    Attributes:
        flying: those on their way.
    """

    def __init__(self, machine) -> None:
        self.machine = machine
        self.flying: list[Flight] = []
        self.warpgroups = max(1, machine.warps // WARPGROUP)
        self.closed = np.zeros(self.warpgroups, np.int64)
        self.registers: set[int] = set()
        every = set(range(len(machine.program.kernel.widths)))
        self.unfenced: list[set[int]] = [every for _ in range(self.warpgroups)]

    def chosen(self, mask: np.ndarray | None) -> np.ndarray:
        """The warpgroups in ``mask``, which must not part them."""
        if mask is None:
            return np.arange(self.warpgroups)
        by_group = self.machine.spread(mask).reshape(self.warpgroups, -1)
        if (by_group.any(1) != by_group.all(1)).any():
            raise Fault("a warpgroup's instruction is reached by some of its threads only")
        return np.flatnonzero(by_group.any(1))

    def issue(
        self, instruction: Instruction, mask: np.ndarray | None, sums: frozenset[int], operands: frozenset[int]
    ) -> np.ndarray:
        """The warpgroups that issue a matrix instruction; its group is theirs that is open. ``sums``, ``operands``: the
        registers that it adds to, and reads.
        """
        which = self.chosen(mask)
        ours = sums | operands
        stale = not instruction.fresh.isdisjoint(ours)
        if stale or (not instruction.fenced and any(not self.unfenced[group].isdisjoint(ours) for group in which)):
            raise Fault("registers that were touched enter a matrix instruction without a wgmma.fence")
        groups = np.zeros(self.warpgroups, np.int64)
        groups[which] = self.closed[which] + 1
        self.flying.append(Flight(groups, sums, operands))
        self.registers |= ours
        return which

    def commit(self, mask: np.ndarray | None) -> None:
        self.closed[self.chosen(mask)] += 1

    def wait(self, newest: int, mask: np.ndarray | None) -> None:
        """All groups of the warpgroups but the ``newest`` are complete."""
        which = self.chosen(mask)
        waiting = np.zeros(self.warpgroups, np.bool_)
        waiting[which] = True
        left = []
        for flight in self.flying:
            flight.groups[waiting & (flight.groups <= self.closed - newest)] = 0
            if flight.groups.any():
                left.append(flight)
        self.flying = left
        self.registers = set().union(*(flight.sums | flight.operands for flight in left))
        clocks = self.machine.clocks
        for group in which:
            rows = group * WARPGROUP + np.arange(WARPGROUP)
            clocks.learn_of(rows, clocks.warpgroup(int(group)), self.closed[group] - newest)

    def check(self, instruction: Instruction, mask: np.ndarray | None) -> None:
        """Refuses what touches a register of an instruction on its way; more of these may add to the same sums."""
        if instruction.parts[0] == "wgmma" or self.registers.isdisjoint(instruction.registers):
            return
        for flight in self.flying:
            touched = not flight.sums.isdisjoint(instruction.registers)
            overwritten = not flight.operands.isdisjoint(instruction.results)
            if not (touched or overwritten):
                continue
            if (
                mask is not None
                and not self.machine.spread(mask).reshape(self.warpgroups, -1).any(1)[flight.groups > 0].any()
            ):
                continue
            what = "touches the sums" if touched else "overwrites an operand"
            raise Fault(f"{what} of a matrix instruction that was not waited for")

    def leave_block(self, steps: Steps, mask: np.ndarray | None) -> None:
        """What a block has touched is unfenced where it ends, behind its last wgmma.fence."""
        if mask is None:
            which = range(self.warpgroups)
        else:
            which = np.flatnonzero(self.machine.spread(mask).reshape(self.warpgroups, -1).any(1))
        for group in which:
            if steps.has_matrix_fence:
                self.unfenced[group] = set(steps.touched_last)
            else:
                self.unfenced[group] = self.unfenced[group] | steps.touched_last

    def finish(self) -> None:
        if self.flying:
            raise Fault("the kernel ends before matrix instructions that nobody waited for")
