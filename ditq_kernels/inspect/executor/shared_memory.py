"""Shared memory that knows who wrote and read each of its bytes, and who may know of that: what two agents do to the
same bytes must be ordered.
"""

from __future__ import annotations

import numpy as np

from .clocks import Clocks
from .faults import PEER, SHARED_BASE, SHARED_POISON, UNSIGNED, WARP, WARPGROUP, Fault

NOBODY = -1


class SharedMemory:
    """Of several thread blocks, one behind the other. ``peers``, of what reads or writes: whether its addresses may be
    of other blocks of the cluster.

    Args:
        size: bytes of one block's.
        threads: of a block.
        grain: the fewest bytes that the kernel reads or writes at once: records are kept for so many.
        copies_need_fence: see :class:`.driver.Session`.
    """

    def __init__(
        self, ctas: int, size: int, threads: int, grain: int, clocks: Clocks, copies_need_fence: bool = True
    ) -> None:
        self.ctas, self.size, self.clocks, self.grain = ctas, size, clocks, grain
        self.copies_need_fence = copies_need_fence
        self.stride = -(-size // 16) * 16
        raw = np.full(ctas * self.stride, SHARED_POISON, np.uint8)
        self.data = {width: raw.view(UNSIGNED[width]) for width in (1, 2, 4, 8, 16)}
        lanes = np.arange(ctas * threads)
        self.base = lanes // threads * self.stride
        self.block, self.warp = lanes // threads, lanes // WARP
        records = ctas * self.stride // grain
        self.writer = np.full(records, NOBODY, np.int16)
        self.written = np.zeros(records, np.int32)  # the writer's step
        self.generic = np.zeros(records, np.bool_)  # written by an instruction, which engines see behind a fence only
        self.copied = np.zeros(records, np.bool_)  # written by cp.async
        self.readers = np.zeros((records, clocks.agents), np.int32)  # each agent's step at its last read
        # Of each block, and of each agent that reached it from outside or as an engine: that one's step the last time.
        self.visits = np.zeros((ctas, clocks.agents), np.int32)
        self.unfenced_copies = 0  # reads by engines that were let through because copies need no fence
        self.disagreements = 0  # lanes whose value another of the same warp replaced in the same instruction

    def place(self, addresses: np.ndarray, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the block of each address, the address as that block itself has it)."""
        blocks, cluster = self.block[lanes], self.clocks.cluster
        rank = addresses.astype(np.int64) // PEER - 1
        if (rank >= cluster).any():
            raise Fault(f"an address in block {rank.max()} of a cluster of {cluster}")
        return np.where(rank < 0, blocks, blocks // cluster * cluster + rank), addresses % PEER

    def index(self, addresses: np.ndarray, width: int, lanes: np.ndarray, peers: bool = False) -> np.ndarray:
        """Elements of the view of ``width``."""
        base = self.base[lanes]
        if peers:
            blocks, addresses = self.place(addresses, lanes)
            base = blocks * self.stride
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if ((offsets < 0) | (offsets + width > self.size)).any():
            raise Fault(f"shared address out of range: {offsets.min()} to {offsets.max() + width} of {self.size}")
        if (offsets & (width - 1)).any():
            raise Fault(f"misaligned shared address, {width} bytes")
        return (base + offsets) // width

    def _visit(self, index, width, agents, steps):
        """Agents reach elements of ``width``, whose blocks must not end before they know of that."""
        if self.clocks.cluster > 1:
            np.maximum.at(self.visits, (index * width // self.stride, agents), steps)

    def end_blocks(self) -> None:
        """All blocks have ended, each of them after whatever reached its memory from outside."""
        knew = self.clocks.seen.reshape(self.ctas, self.clocks.warps, -1).max(1)
        blocks, agents = np.nonzero(self.visits > knew)
        if len(blocks):
            rank, who = blocks[0] % self.clocks.cluster, self.clocks.name(int(agents[0]))
            raise Fault(f"block {rank} of a cluster may end before its shared memory is reached by {who}")

    def _records(self, index, width, rows):
        """(records of elements of ``width``, the rows that belong to them)."""
        many = width // self.grain
        if many == 1:
            return index, rows
        return (index[:, None] * many + np.arange(many)).ravel(), np.repeat(rows, many)

    def _blame(self, what, agents, bad):
        raise Fault(f"shared memory race: {what} {self.clocks.name(int(agents[bad][0]))}, with nothing between them")

    def _check_writers(self, records, rows, what, by_engine=False, initialised=True):
        """The last write of each record must be known to the warp, and behind a fence to an engine."""
        writer, step = self.writer[records], self.written[records]
        if initialised and (writer == NOBODY).any():
            raise Fault(f"{what} shared memory that nobody wrote")
        known = (self.clocks.seen[rows, writer] >= step) | (writer == NOBODY)
        if not known.all():
            self._blame(f"{what} what was written by", writer, ~known)
        if by_engine:
            shown = (self.clocks.fenced[rows, writer] >= step) | ~self.generic[records] | (writer == NOBODY)
            if not shown.all():
                of_copies = bool(self.copied[records][~shown].all())
                if self.copies_need_fence or not of_copies:
                    written = "copies by cp.async" if of_copies else "stores"
                    raise Fault(f"an engine {what} {written} that no fence.proxy.async has shown to it")
                self.unfenced_copies += 1

    def _check_readers(self, records, rows, by_engine=False):
        """All reads of each record must be known to the warp that writes it, and behind a fence to an engine."""
        readers = self.readers[records]
        known = readers <= self.clocks.seen[rows]
        if not known.all():
            self._blame("overwrites what was read by", np.nonzero(~known)[1], slice(None))
        if by_engine and not (readers <= self.clocks.fenced[rows])[:, : self.clocks.first_mbarrier].all():
            raise Fault("an engine overwrites what was read, and no fence.proxy.async stands between")

    def touch(
        self, addresses: np.ndarray, width: int, lanes: np.ndarray, what: str = "reads", peers: bool = False
    ) -> np.ndarray:
        """A read without its data: elements of the view of ``width``."""
        index, warps = self.index(addresses, width, lanes, peers), self.warp[lanes]
        records, rows = self._records(index, width, warps)
        self._check_writers(records, rows, what)
        self.readers[records, self.clocks.local[rows]] = self.clocks.now(rows)
        if peers:
            self._visit(index, width, self.clocks.local[warps], self.clocks.now(warps))
        return index

    def load(self, addresses: np.ndarray, width: int, lanes: np.ndarray, peers: bool = False) -> np.ndarray:
        """``width`` bytes at each address."""
        return self.data[width][self.touch(addresses, width, lanes, peers=peers)]

    def _claim(self, index, width, rows, writer, step, by_engine=False, generic=True, copied=False):
        records, rows = self._records(index, width, rows)
        self._check_writers(records, rows, "overwrites", by_engine, initialised=False)
        self._check_readers(records, rows, by_engine)
        many = width // self.grain
        self.writer[records] = np.repeat(writer, many) if np.ndim(writer) and many > 1 else writer
        self.written[records] = np.repeat(step, many) if np.ndim(step) and many > 1 else step
        self.generic[records], self.copied[records] = generic, copied
        self.readers[records] = 0

    def store(
        self, addresses: np.ndarray, width: int, values: np.ndarray, lanes: np.ndarray, peers: bool = False
    ) -> None:
        """The inverse of :meth:`load`."""
        index, rows = self.index(addresses, width, lanes, peers), self.warp[lanes]
        own = self.clocks.local[rows]
        self._claim(index, width, rows, own, self.clocks.now(rows))
        if peers:
            self._visit(index, width, own, self.clocks.now(rows))
        view = self.data[width]
        view[index] = values
        lost = view[index] != values
        if lost.any():  # one lane of a warp wins, and nothing says which; of several warps, not even the order
            first = index[lost] * (width // self.grain)
            if (self.writer[first] != own[lost]).any():
                raise Fault("shared memory race: warps write different values to one place at once")
            self.disagreements += int(lost.sum())

    def start_copy(self, index: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """A cp.async of ``lanes`` will write the elements; until it was waited for, nobody may touch them."""
        self._claim(index, width, self.warp[lanes], self.clocks.pending, 1, copied=True)
        self.data[width][index] = np.full(1, SHARED_POISON, np.uint8).repeat(width).view(UNSIGNED[width])

    def arrive(self, index: np.ndarray, width: int, values: np.ndarray, lanes: np.ndarray) -> None:
        """A copy that was waited for is now the waiting warps' own write."""
        self.data[width][index] = values
        records, rows = self._records(index, width, self.warp[lanes])
        self.writer[records], self.written[records] = self.clocks.local[rows], self.clocks.now(rows)

    def copy_by_engine(self, addresses: np.ndarray, values: np.ndarray, lane: int, agent: int, step: int) -> None:
        """16-byte ``values`` that the copy engine writes for ``lane``, also to a peer, seen by those who have seen
        ``agent`` at ``step``.
        """
        lanes = np.full(len(addresses), lane)
        index = self.index(addresses, 16, lanes, peers=True)
        self._claim(index, 16, self.warp[lanes], agent, step, by_engine=True, generic=False)
        self._visit(index, 16, agent, step)
        self.data[16][index] = values

    def signal_by_engine(self, address: int, lane: int, agent: int, step: int) -> None:
        """The copy engine will arrive at an mbarrier, also a peer's, for ``lane``, who must know of its beginning."""
        index = self.index(np.full(1, address), 8, np.full(1, lane), peers=True)
        records, rows = self._records(index, 8, self.warp[[lane]])
        self._check_writers(records, rows, "signals")
        self.readers[records, agent] = step

    def read_by_engine(self, index: np.ndarray, warpgroup: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """16-byte elements that matrix instructions read on their own until they are waited for.

        Args:
            index: [warpgroups, ...] elements.
            warpgroup: the number of each warpgroup, over all blocks.
            steps: the group of matrix instructions that each read belongs to.
        """
        for number, step, elements in zip(warpgroup, steps, index, strict=True):
            rows = number * WARPGROUP + np.arange(WARPGROUP)
            records, _ = self._records(np.unique(elements), 16, np.zeros(0, np.int64))
            for row in rows:
                self._check_writers(records, np.full(1, row), "reads", by_engine=True)
            self.readers[records, self.clocks.warpgroup(int(number))] = step
        return self.data[16][index]
