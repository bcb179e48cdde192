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
    blocks, columns within one cluster of ``cluster`` blocks.

    Attributes:
        published: both tables as they were at each warp's last fence: what an arrival that is relaxed tells.
    """

    def __init__(self, ctas: int, warps: int, mbarriers: int, cluster: int = 1) -> None:
        self.ctas, self.warps, self.mbarriers, self.cluster = ctas, warps, mbarriers, cluster
        self.first_mbarrier = cluster * warps
        self.first_warpgroup = self.first_mbarrier + cluster * mbarriers
        # Of copies that nobody waited for: never seen.
        self.pending = self.first_warpgroup + -(-cluster * warps // WARPGROUP)
        self.agents = self.pending + 1
        self.seen = np.zeros((ctas * warps, self.agents), np.int32)
        self.fenced = np.zeros_like(self.seen)
        self.rows = np.arange(ctas * warps)
        self.local = self.rows % (cluster * warps)
        self.seen[self.rows, self.local] = 1
        self.published = np.zeros_like(self.seen), np.zeros_like(self.seen)

    def now(self, rows: np.ndarray) -> np.ndarray:
        """The steps that the warps are at."""
        return self.seen[rows, self.local[rows]]

    def advance(self, rows: np.ndarray) -> None:
        """A next step begins: what was done before can be told from what comes."""
        self.seen[rows, self.local[rows]] += 1

    def mbarrier(self, block: int, number: int) -> int:
        """The column of the copies behind a block's mbarrier."""
        return self.first_mbarrier + block % self.cluster * self.mbarriers + number

    def warpgroup(self, number: int) -> int:
        """The column of the matrix instructions of a warpgroup, whose number counts over all blocks."""
        return self.first_warpgroup + number * WARPGROUP % self.first_mbarrier // WARPGROUP

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

    def publish(self, rows: np.ndarray) -> None:
        """A fence: whom the warps meet from now on knows all that they know, even if they meet without an order."""
        for published, table in zip(self.published, (self.seen, self.fenced), strict=True):
            published[rows] = table[rows]
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
        if self.cluster == 1:
            return f"warp {agent}"
        return f"warp {agent % self.warps} of block {agent // self.warps} of the cluster"
