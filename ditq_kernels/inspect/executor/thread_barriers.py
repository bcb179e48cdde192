"""bar.sync and bar.arrive: barriers of a block's threads, numbered 0 to 15."""

from __future__ import annotations

import numpy as np

from .faults import Fault


class ThreadBarriers:
    """Of the :class:`.machine.Machine` that it is given.

    Attributes:
        held: lanes that wait at one.
    """

    def __init__(self, machine) -> None:
        self.machine = machine
        self.held = np.zeros(machine.lanes, np.bool_)
        self.holds_any = False
        # By (block, number): lanes that have arrived, those of them that wait, and how many are expected (None: all).
        self.arrived: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, int | None]] = {}

    def reach(self, mask: np.ndarray | None, number: int, count: int | None, waits: bool) -> None:
        """The lanes in ``mask`` arrive at barrier ``number`` of ``count`` threads (None: all of the block)."""
        m = self.machine
        if mask is None and waits and count in (None, m.threads) and not self.arrived:
            m.clocks.meet_blocks()
            return
        m.whole_warps(mask)
        lanes = m.chosen(mask)
        for block in np.unique(m.cta_of_lane[lanes]):
            here = lanes[m.cta_of_lane[lanes] == block]
            arrived, waiting, expected = self.arrived.get((block, number), (here[:0], here[:0], count))
            if expected != count:
                raise Fault(f"barrier {number} is reached with {count} and with {expected} threads")
            if np.isin(here, arrived).any():
                raise Fault(f"a thread arrives twice at barrier {number}")
            arrived = np.concatenate((arrived, here))
            waiting = np.concatenate((waiting, here)) if waits else waiting
            self.arrived[block, number] = arrived, waiting, count
            self.held[here] = waits
            self._release(block, number)
        self.holds_any = bool(self.held.any())

    def _release(self, block, number) -> bool:
        m = self.machine
        arrived, waiting, count = self.arrived[block, number]
        of_block = np.arange(block * m.threads, (block + 1) * m.threads)
        alive = of_block if m.alive is None else of_block[m.alive[of_block]]
        if len(arrived) < (len(alive) if count is None else count):
            return False
        m.clocks.meet(np.unique(m.row_of_lane[arrived]))
        self.held[waiting] = False
        del self.arrived[block, number]
        return True

    def release_for_the_living(self, alive: np.ndarray) -> bool:
        """Barriers that wait for threads that have ended since; whether any opened."""
        opened = [self._release(*key) for key in list(self.arrived)]
        self.holds_any = bool(self.held.any())
        return any(opened)
