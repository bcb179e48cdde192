"""bar.sync and bar.arrive: barriers of a block's threads, numbered 0 to 15."""

from __future__ import annotations

import numpy as np

from .faults import WARP, Fault


class ThreadBarriers:
    """Of the :class:`.machine.Machine` that it is given.

    Attributes:
        held: lanes that wait at one.
    """

    def __init__(self, machine) -> None:
        self.machine = machine
        self.held = np.zeros(machine.lanes, np.bool_)
        self.holds_any = False
        # By (block, number): lanes that have arrived, those of them that wait, how many are expected (None: all), and
        # what those knew who arrived.
        self.arrived: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, int | None, list[np.ndarray]]] = {}

    def reach(self, mask: np.ndarray | None, number: int, count: int | None, waits: bool) -> None:
        """The lanes in ``mask`` arrive at barrier ``number`` of ``count`` threads (None: all of the block)."""
        m = self.machine
        if mask is None and waits and count in (None, m.threads) and not self.arrived:
            m.clocks.meet_blocks()
            return
        m.whole_warps(mask)
        if count is not None and count % WARP:
            raise Fault(f"barrier {number} of {count} threads, which are no whole warps")
        lanes = m.chosen(mask)
        tables = m.clocks.seen, m.clocks.fenced
        for block in np.unique(m.cta_of_lane[lanes]):
            here = lanes[m.cta_of_lane[lanes] == block]
            rows = np.unique(m.row_of_lane[here])
            nothing = [np.zeros(m.clocks.agents, np.int32) for _ in tables]
            arrived, waiting, expected, knew = self.arrived.get((block, number), (here[:0], here[:0], count, nothing))
            if expected != count:
                raise Fault(f"barrier {number} is reached with {count} and with {expected} threads")
            if np.isin(here, arrived).any():
                raise Fault(f"a thread arrives twice at barrier {number}")
            arrived = np.concatenate((arrived, here))
            if count is not None and len(arrived) > count:
                raise Fault(f"more than {count} threads arrive at barrier {number} at once")
            knew = [np.maximum(old, table[rows].max(0)) for old, table in zip(knew, tables, strict=True)]
            m.clocks.advance(rows)
            waiting = np.concatenate((waiting, here)) if waits else waiting
            self.arrived[block, number] = arrived, waiting, count, knew
            self.held[here] = waits
            self._release(block, number)
        self.holds_any = bool(self.held.any())

    def _release(self, block, number) -> bool:
        m = self.machine
        arrived, waiting, count, knew = self.arrived[block, number]
        of_block = np.arange(block * m.threads, (block + 1) * m.threads)
        alive = of_block if m.alive is None else of_block[m.alive[of_block]]
        if len(arrived) < (len(alive) if count is None else count):
            return False
        if len(waiting):  # who only arrives learns nothing of the others
            m.clocks.learn(np.unique(m.row_of_lane[waiting]), *knew)
        self.held[waiting] = False
        del self.arrived[block, number]
        return True

    def release_for_the_living(self, alive: np.ndarray) -> bool:
        """Barriers that wait for threads that have ended since; whether any opened."""
        opened = [self._release(*key) for key in list(self.arrived)]
        self.holds_any = bool(self.held.any())
        return any(opened)
