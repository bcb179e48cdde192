"""Who knows what of whom: vector clocks of warps, copies and matrix instructions, by which a race is told from order.

An *agent* is what reads or writes shared memory on its own: a warp, the copies behind one mbarrier, the matrix
instructions of one warpgroup. Each has a column; a warp's row says up to which of the agent's steps it has seen. A
barrier joins the rows of those that meet. (Lamport's order, kept as in FastTrack, Flanagan and Freund 2009.)

A second table says the same of what has passed a proxy fence on the way: the engines that copy tensors and multiply
matrices reach memory by another path (the *async proxy*) and see only that.
"""

from __future__ import annotations

import numpy as np

from .faults import WARPGROUP


class Clocks:
    """Of ``ctas`` thread blocks of ``warps`` warps and at most ``mbarriers`` mbarriers each; rows are counted over all
    blocks, columns within one.
    """

    def __init__(self, ctas: int, warps: int, mbarriers: int) -> None:
        self.ctas, self.warps = ctas, warps
        self.first_mbarrier = warps
        self.first_warpgroup = warps + mbarriers
        self.pending = self.first_warpgroup + -(-warps // WARPGROUP)  # of copies that nobody waited for: never seen
        self.agents = self.pending + 1
        self.seen = np.zeros((ctas * warps, self.agents), np.int32)
        self.fenced = np.zeros_like(self.seen)
        self.rows = np.arange(ctas * warps)
        self.local = self.rows % warps
        self.seen[self.rows, self.local] = 1

    def now(self, rows: np.ndarray) -> np.ndarray:
        """The steps that the warps are at."""
        return self.seen[rows, self.local[rows]]

    def advance(self, rows: np.ndarray) -> None:
        """A next step begins: what was done before can be told from what comes."""
        self.seen[rows, self.local[rows]] += 1

    def meet_blocks(self, ctas: np.ndarray | None = None) -> None:
        """All warps of whole blocks meet, block by block; None: of all blocks."""
        chosen = slice(None) if ctas is None else ctas
        for table in (self.seen, self.fenced):
            by_block = table.reshape(self.ctas, self.warps, -1)
            by_block[chosen] = by_block[chosen].max(1, keepdims=True)
        self.advance(self.rows if ctas is None else self.rows.reshape(self.ctas, self.warps)[ctas].ravel())

    def fence(self, rows: np.ndarray) -> None:
        """All that the warps know has passed a proxy fence."""
        self.fenced[rows] = np.maximum(self.fenced[rows], self.seen[rows])
        self.advance(rows)

    def learn(self, rows: np.ndarray, seen: np.ndarray, fenced: np.ndarray) -> None:
        """The warps know what one row of each table says."""
        self.seen[rows] = np.maximum(self.seen[rows], seen)
        self.fenced[rows] = np.maximum(self.fenced[rows], fenced)

    def learn_of(self, rows: np.ndarray, agent: int, step: int | np.ndarray) -> None:
        """The warps have seen an agent that is no warp up to ``step``; its writes need no fence."""
        for table in (self.seen, self.fenced):
            table[rows, agent] = np.maximum(table[rows, agent], step)

    def name(self, agent: int) -> str:
        """For messages."""
        if agent == self.pending:
            return "a copy that was not waited for"
        if agent >= self.first_warpgroup:
            return "a matrix instruction that was not waited for"
        if agent >= self.first_mbarrier:
            return "a tensor copy that was not waited for"
        return f"warp {agent}"
