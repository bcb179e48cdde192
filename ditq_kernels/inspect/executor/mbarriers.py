"""mbarriers: counters in shared memory that threads and tensor copies arrive at, phase after phase."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .clocks import Clocks
from .faults import Fault, Unsupported

MOST_MBARRIERS = 32  # of one block


@dataclass
class Barrier:
    """Attributes:
    agent: the clocks' column of the copies behind it.
    expected, pending: arrivals of a phase, and those still to come; ``bytes_due``: of copies, likewise.
    arriving, complete: what those knew who arrived (seen, fenced): in the phase that runs, and in complete ones.
    before: phases that barriers at the same place completed; ``phase``: that this one has.
    asked: warps that have asked for the last complete phase.
    """

    agent: int
    expected: int
    pending: int
    arriving: tuple[np.ndarray, np.ndarray]
    complete: tuple[np.ndarray, np.ndarray]
    before: int
    bytes_due: int = 0
    phase: int = 0
    asked: set[int] = field(default_factory=set)

    @property
    def next_step(self) -> int:
        """The agent's step that the phase which runs will complete."""
        return self.before + self.phase + 1

    def settle(self) -> bool:
        """Ends the phase if nothing is missing; whether it did."""
        if self.pending or self.bytes_due:
            return False
        self.phase += 1
        self.asked.clear()
        self.pending = self.expected
        self.complete = tuple(part.copy() for part in self.arriving)
        return True


class Barriers:
    """All of the blocks that run, by (block, address)."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.known: dict[tuple[int, int], Barrier] = {}
        self.places: dict[tuple[int, int], tuple[int, int]] = {}  # column, and phases of the barriers before

    def initialise(self, block: int, address: int, count: int) -> None:
        key = block, address
        number = sum(other == block for other, _ in self.places)
        if key not in self.places and number >= MOST_MBARRIERS:
            raise Unsupported(f"more than {MOST_MBARRIERS} mbarriers")
        agent, before = self.places.setdefault(key, (self.clocks.mbarrier(block, number), 0))
        nothing = tuple(np.zeros(self.clocks.agents, np.int32) for _ in range(2))
        self.known[key] = Barrier(agent, count, count, nothing, nothing, before)

    def invalidate(self, block: int, address: int) -> None:
        barrier = self.at(block, address)
        if barrier.bytes_due:
            raise Fault("ends an mbarrier that copies are still to arrive at")
        self.places[block, address] = barrier.agent, barrier.before + barrier.phase
        del self.known[block, address]

    def at(self, block: int, address: int) -> Barrier:
        """Fault if there is none."""
        if (block, address) not in self.known:
            raise Fault("uses an mbarrier that was not initialised")
        return self.known[block, address]

    def arrive(self, block: int, address: int, row: int, count: int = 1, due: int = 0) -> bool:
        """A thread of warp ``row`` arrives, and says how many bytes are to come; whether that ends the phase."""
        barrier = self.at(block, address)
        if barrier.pending < count:
            raise Fault("more arrivals at an mbarrier than it expects")
        barrier.arriving = tuple(
            np.maximum(old, table[row])
            for old, table in zip(barrier.arriving, (self.clocks.seen, self.clocks.fenced), strict=True)
        )
        self.clocks.advance(np.array([row]))
        barrier.pending -= count
        barrier.bytes_due += due
        return barrier.settle()

    def asks_early(self, block: int, address: int, parity: int, rows: np.ndarray) -> bool:
        """Whether the warps are told once that the complete phase of ``parity`` is not: they might as well have asked
        before it was, unless they knew already. Who does not ask again has waited for nothing.
        """
        barrier = self.at(block, address)
        known = self.clocks.seen[rows, barrier.agent] >= barrier.before + barrier.phase
        if barrier.phase & 1 == parity or known.all() or barrier.asked.issuperset(rows.tolist()):
            return False
        barrier.asked.update(rows.tolist())
        return True

    def wait(self, block: int, address: int, parity: int, rows: np.ndarray) -> bool:
        """Whether the phase of ``parity`` is complete; then the warps know what came of it."""
        barrier = self.at(block, address)
        if barrier.phase & 1 == parity:
            return False
        self.clocks.learn(rows, *barrier.complete)
        self.clocks.learn_of(rows, barrier.agent, barrier.before + barrier.phase)
        return True
