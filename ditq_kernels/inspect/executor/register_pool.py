"""setmaxnreg: the registers of a thread block, which its warps give up and take over while they run.

A warp that takes more waits until others have given up as many. If nobody does, it waits for ever.
"""

from __future__ import annotations

import numpy as np

from .faults import WARP, Fault

MOST_OF_A_THREAD, MULTIPROCESSOR = 255, 65536  # registers
UNIT = 8  # registers of a thread are given out in multiples of it


def at_first(threads: int) -> int:
    """Registers of a thread of a kernel that does not say it: as many as a block of so many threads can have."""
    return min(MOST_OF_A_THREAD, MULTIPROCESSOR // threads) // UNIT * UNIT


class RegisterPool:
    """Of the :class:`.machine.Machine` that it is given, block by block.

    Attributes:
        held: lanes that wait for registers; ``holds_any``: whether there are any.
    """

    def __init__(self, machine, of_a_thread: int | None) -> None:
        self.machine = machine
        of_a_thread = of_a_thread or at_first(machine.threads)
        self.has = np.full(machine.warps, of_a_thread)
        self.free = np.zeros(machine.ctas, np.int64)
        self.waiting: list[tuple[int, int]] = []  # (warp, registers of a thread that it asked for), the oldest first
        self.held = np.zeros(machine.lanes, np.bool_)
        self.holds_any = False

    def give_up(self, mask: np.ndarray | None, count: int) -> None:
        """The warps in ``mask`` keep ``count`` registers of a thread."""
        self.machine.whole_warps(mask)
        for warp in self.machine.rows(mask):
            if count > self.has[warp]:
                raise Fault(f"a warp that has {self.has[warp]} registers of a thread gives up all but {count}")
            self.free[self._block(warp)] += WARP * (self.has[warp] - count)
            self.has[warp] = count
        self._serve()

    def take(self, mask: np.ndarray | None, count: int) -> None:
        """The warps in ``mask`` wait until they have ``count`` registers of a thread."""
        self.machine.whole_warps(mask)
        for warp in self.machine.rows(mask):
            if count < self.has[warp]:
                raise Fault(f"a warp that has {self.has[warp]} registers of a thread takes as many as make {count}")
            self.waiting.append((int(warp), count))
            self._hold(warp, True)
        self._serve()

    def _block(self, warp):
        return warp * WARP // self.machine.threads

    def _hold(self, warp, held):
        self.held[warp * WARP : (warp + 1) * WARP] = held

    def _serve(self):
        left = []
        for warp, count in self.waiting:
            more = WARP * (count - self.has[warp])
            if more > self.free[self._block(warp)]:
                left.append((warp, count))
                continue
            self.free[self._block(warp)] -= more
            self.has[warp] = count
            self._hold(warp, False)
        self.waiting, self.holds_any = left, bool(left)
