"""A GPU as far as a compiled kernel can tell: threads as lanes of numpy arrays, the memories, and who waits for whom.

Lanes are the threads of one or several thread blocks (CTAs), block by block. A register is one array of unsigned
integers (booleans for predicates) with one element a lane, or with a single element where all lanes agree. Where lanes
part, those at the lowest program counter that need not wait go first, which brings them together again; instructions
of a whole warp wait for all of its lanes.
"""

from __future__ import annotations

import collections

import numpy as np

from .async_state import CopyGroups, MatrixGroups
from .clocks import Clocks
from .cluster_barriers import ClusterBarriers
from .counters import Counters, at_once
from .faults import LOCAL_BASE, MOST_PEERS, PEER, POISON, SHARED_BASE, UNSIGNED, WARP, Fault
from .global_memory import GlobalMemory
from .mbarriers import MOST_MBARRIERS, Barriers
from .program import Program
from .register_pool import RegisterPool
from .shared_memory import SharedMemory
from .thread_barriers import ThreadBarriers

MOST_STEPS = 3_000_000
MOST_IDLE_WAITS = 100


class Machine:
    """A launch of one kernel.

    Args:
        program: the translated kernel.
        parameters: by name, each an array of one element, bytes of a structure, or a tensor map.
        grid: thread blocks along x, y, z.
        threads: of a block.
        shared_bytes: of a block, beyond the arrays that the kernel declares.
        wobble: by how many units of the last place approximate instructions may be off, each value by its own.
        matrix_unit: how fp32 sums of matrix instructions are cut, of :func:`.tensor_core.unit_of`; None rounds them.
        lanes: threads that run at once, as long as a block has no more.
        copies_need_fence: see :class:`.driver.Session`.
        counters: what counts; None counts nothing.
        cluster: thread blocks of a cluster, neighbours along x.

    Raises:
        Fault: for a grid that is not made of such clusters.
    """

    def __init__(
        self,
        program: Program,
        parameters: dict[str, object],
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        memory: GlobalMemory,
        wobble: int = 0,
        matrix_unit: tuple[int, int] | None = None,
        lanes: int = 4096,
        copies_need_fence: bool = True,
        counters: Counters | None = None,
        cluster: int = 1,
    ) -> None:
        if grid[0] % cluster:
            raise Fault(f"a grid of {grid} thread blocks is not made of clusters of {cluster}")
        self.cluster = cluster
        self.program, self.parameters, self.grid, self.threads = program, parameters, grid, threads
        self.shared_bytes = program.kernel.static_shared + shared_bytes
        self.memory, self.wobble, self.matrix_unit = memory, wobble, matrix_unit
        # Persistent blocks part from each other, and mbarriers are counted block by block.
        self.ctas_at_once = cluster if program.has_mbarriers else max(1, lanes // threads // cluster) * cluster
        self.executed: collections.Counter[str] = collections.Counter()
        self.copies_need_fence, self.counters = copies_need_fence, counters
        self.disagreements = self.unfenced_copies = 0
        self.steps = 0

    def launch(self, most_blocks: int | None = None) -> None:
        """Runs all blocks, or so many of them, spread evenly over the grid, in whole clusters. Raises Fault for what
        must not happen, Unsupported for what is not implemented.
        """
        x, y, z = self.grid
        clusters = np.arange(x * y * z // self.cluster)
        most = None if most_blocks is None else -(-most_blocks // self.cluster)
        if most is not None and most < len(clusters):
            clusters = ((np.arange(most) + 0.5) * len(clusters) // most).astype(np.int64)
        all_ctas = (clusters[:, None] * self.cluster + np.arange(self.cluster)).ravel()
        if self.counters:
            self.counters.blocks += len(all_ctas)
            self.counters.tensors = {region.name: region.filled for region in self.memory.regions}
        with np.errstate(all="ignore"):
            for first in range(0, len(all_ctas), self.ctas_at_once):
                self._run(all_ctas[first : first + self.ctas_at_once])
                self.disagreements += self.shared.disagreements
                self.unfenced_copies += self.shared.unfenced_copies
        self.memory.check_aliases()

    def _begin(self, ctas):
        kernel, threads = self.program.kernel, self.threads
        self.ctas = len(ctas)
        self.lanes = len(ctas) * threads
        self.every_lane = np.arange(self.lanes)
        self.cta_of_lane = self.every_lane // threads
        self.row_of_lane = self.every_lane // WARP
        self.warps = self.lanes // WARP
        self.special = self._special_registers(ctas)
        self.registers = [
            np.full(1, POISON & (256**width - 1), UNSIGNED[width]) if width else np.zeros(1, np.bool_)
            for width in kernel.widths
        ]
        mbarriers = MOST_MBARRIERS if self.program.has_mbarriers else 0
        self.clocks = Clocks(len(ctas), threads // WARP, mbarriers, self.cluster)
        self.shared = SharedMemory(
            len(ctas), self.shared_bytes, threads, self.program.grain, self.clocks, self.copies_need_fence
        )
        self.local = np.full((self.lanes, kernel.local_bytes), POISON & 0xFF, np.uint8)
        self.copies = CopyGroups(self)
        self.matrices = MatrixGroups(self)
        self.mbarriers = Barriers(self.clocks)
        self.thread_barriers = ThreadBarriers(self)
        self.cluster_barriers = ClusterBarriers(self)
        self.register_pool = RegisterPool(self, kernel.registers)
        self.stalled = np.zeros(self.lanes, np.bool_)  # lanes that found an mbarrier's phase incomplete
        self.idle_waits = 0

    def _special_registers(self, ctas):
        threads = self.threads
        x, y, _ = self.grid
        special = {"%tid.x": np.tile(np.arange(threads, dtype=np.uint32), len(ctas))}
        special["%laneid"] = special["%tid.x"] % np.uint32(WARP)
        special["%warpid"] = special["%tid.x"] // np.uint32(WARP)
        places = {"x": ctas % x, "y": ctas // x % y, "z": ctas // (x * y)}
        for axis, extent in zip("xyz", self.grid, strict=True):
            cluster = self.cluster if axis == "x" else 1
            for name, place in (
                (f"%ctaid.{axis}", places[axis]),
                (f"%clusterid.{axis}", places[axis] // cluster),
                (f"%cluster_ctaid.{axis}", places[axis] % cluster),
            ):
                place = place.astype(np.uint32)
                special[name] = place if len(ctas) == 1 else np.repeat(place, threads)
            special[f"%nctaid.{axis}"] = np.full(1, extent, np.uint32)
            special[f"%nclusterid.{axis}"] = np.full(1, extent // cluster, np.uint32)
            special[f"%cluster_nctaid.{axis}"] = np.full(1, cluster, np.uint32)
        special["%cluster_ctarank"] = special["%cluster_ctaid.x"]
        special["%cluster_nctarank"] = special["%cluster_nctaid.x"]
        special["%is_explicit_cluster"] = np.full(1, self.cluster > 1)
        for name, value in (("%ntid.x", threads), ("%ntid.y", 1), ("%ntid.z", 1), ("%tid.y", 0), ("%tid.z", 0)):
            special[name] = np.full(1, value, np.uint32)
        return special

    def _run(self, ctas):
        self._begin(ctas)
        end = len(self.program.blocks)
        block, places = 0, None  # of all lanes, or of each
        while True:
            mask = None
            if places is not None:
                mask = self._next(places, end)
                if mask is None:
                    break
                block = int(places[mask.argmax()])
                if mask.all():
                    mask = places = None
            elif block == end:
                break
            self.alive = None if places is None else places != end
            after = self._block(self.program.blocks[block], mask)
            go, target = (None, block + 1) if after is None else after  # falls through
            alike = isinstance(target, int) and (go is None or go.size == 1 or _alike(go))
            if places is None and alike and not (self.thread_barriers.holds_any or self.register_pool.holds_any):
                block = target if go is None or go[0] else block + 1
                continue
            if places is None:
                places = np.full(self.lanes, block)
                mask = np.ones(self.lanes, np.bool_)
            there = np.where(np.ones(1, np.bool_) if go is None else go, target, block + 1)
            places = np.where(mask, there, places)
        self.copies.finish()
        self.matrices.finish()
        self.shared.end_blocks()
        if self.counters:
            self.counters.end_blocks()

    def _next(self, places, end):
        """The lanes to run: those at the lowest program counter that wait for nothing; None if all have ended."""
        alive = places != end
        if not alive.any():
            return None
        free = alive & ~(self.thread_barriers.held | self.register_pool.held)
        if not (free & ~self.stalled).any():
            self.alive = alive
            opened = self.thread_barriers.release_for_the_living(alive)
            if not (self.cluster_barriers.release_for_the_living() or opened):
                if self.register_pool.holds_any:
                    raise Fault("threads wait for registers, and nobody is left to give any up")
                if free.any():
                    raise Fault("threads wait for mbarriers, and nobody is left to arrive")
                if self.cluster_barriers.waiting.any():
                    raise Fault("the barrier of a cluster is reached by some of its threads only")
                raise Fault("a barrier is reached by some threads of a block only")
            free = alive & ~(self.thread_barriers.held | self.register_pool.held)
        free &= ~self.stalled
        left = free
        while left.any():
            block = places[left].min()
            here = left & (places == block)
            if not self.program.blocks[block].gathers:
                return here
            # The block may stand before a loop that some of the warp's lanes are still in: as the hardware's, its
            # instructions wait for all lanes.
            missing = (alive & (places != block)).reshape(-1, WARP).any(1)
            whole = here & ~np.repeat(missing, WARP)
            if whole.any():
                return whole
            left = left & (places != block)
        return free & (places == places[free].min())

    def _block(self, steps, mask):
        """Runs one block for the lanes in ``mask``; (which of them jump, None for all; where to), or None."""
        self.steps += len(steps)
        if self.steps > MOST_STEPS:
            raise Fault("does not end")
        after = None
        for run, guard, negated, instruction in steps:
            active = mask
            if guard is not None:
                active = self.registers[guard]
                active = ~active if negated else active
                if run is None:
                    after = active, instruction.target
                    break  # a branch ends its block
                if active.size == 1:
                    if not active[0]:
                        continue
                    active = mask
                elif mask is not None:
                    active = active & mask
            elif run is None:
                after = None, self._picked(instruction, mask)
                break
            try:
                if self.matrices.flying:
                    self.matrices.check(instruction, active)
                run(self, active)
            except Fault as fault:
                raise Fault(f"{fault} [{instruction.text[:150]}]") from None
        if self.program.has_matrices:
            self.matrices.leave_block(steps, mask)
        self.executed.update(steps.opcodes)
        if self.counters:
            warps = self.warps if mask is None else len(self.rows(mask))
            self.counters.entered[steps.number] += warps
            for name, count in steps.issues.items():
                self.counters.issued[name] += warps * count
            for wait, count in steps.waits.items():
                self.counters.waits[wait] += warps * count
        return after

    def _picked(self, instruction, mask):
        """Where a branch leads: one block, or, of a table, one for each lane."""
        table = instruction.target
        if not isinstance(table, np.ndarray):
            return table
        which = self.registers[instruction.operands[0].index]
        asked = which if which.size == 1 else which[self.chosen(mask)]
        if (asked >= len(table)).any():
            raise Fault(f"a branch to place {asked.max()} of a table of {len(table)} [{instruction.text}]")
        if (asked == asked[0]).all():
            return int(table[asked[0]])
        return table[np.minimum(self.spread(which), len(table) - 1)]

    # What instructions ask for.

    def spread(self, value: np.ndarray) -> np.ndarray:
        """One element a lane."""
        return value if value.size == self.lanes else np.broadcast_to(value, self.lanes)

    def chosen(self, mask: np.ndarray | None) -> np.ndarray:
        """Indices of the lanes in ``mask``."""
        return self.every_lane if mask is None else np.flatnonzero(self.spread(mask))

    def rows(self, mask: np.ndarray | None) -> np.ndarray:
        """Warps with lanes in ``mask``."""
        return self.clocks.rows if mask is None else np.unique(self.row_of_lane[self.chosen(mask)])

    def whole_warps(self, mask: np.ndarray | None) -> None:
        """Refuses a mask that parts a warp."""
        if mask is not None:
            by_warp = self.spread(mask).reshape(-1, WARP)
            parted = by_warp.any(1) != by_warp.all(1)
            if parted.any():
                waits = self.stalled.reshape(-1, WARP)[parted].any()
                others = ": others wait for an mbarrier, and nobody is left to arrive" if waits else ""
                raise Fault(f"a warp's instruction is reached by some of its lanes only{others}")

    def count_global(self, kind: str, addresses: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """Accesses of ``width`` bytes at ``addresses`` of global memory by ``lanes``."""
        if self.counters:
            for tensor, which, offsets in self.memory.places_in_sectors(addresses, width):
                rows = self.row_of_lane[lanes[which]]
                self.counters.request(kind, tensor, rows, self.threads // WARP, offsets, width)

    def count_shared(self, kind: str, addresses: np.ndarray, width: int, lanes: np.ndarray) -> None:
        """Accesses of ``width`` bytes at ``addresses`` of shared memory by ``lanes``."""
        if self.counters:
            groups = at_once(self.row_of_lane[lanes], lanes, width)
            self.counters.shared(kind, groups, addresses.astype(np.int64), width)

    def approximate(self, value: np.ndarray) -> np.ndarray:
        """fp32 values as an approximate instruction may return them."""
        if not self.wobble:
            return value
        # By the value and not by the lane: an instruction gives equal results for equal operands.
        mixed = (value.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(16)
        off = (mixed % np.uint32(2 * self.wobble + 1)).astype(np.int32) - np.int32(self.wobble)
        ordinary = np.isfinite(value) & (np.abs(value) > 1e-30)
        return np.where(ordinary, (value.view(np.int32) + off).view(np.float32), value)

    def waited(self, lanes: np.ndarray, done: np.ndarray) -> None:
        """``lanes`` asked for a phase; those that are not ``done``, nor may ask again, wait until one completes."""
        self.idle_waits = 0 if done.any() else self.idle_waits + 1
        if self.idle_waits > MOST_IDLE_WAITS * self.ctas:
            raise Fault("waits for ever")
        self.stalled[lanes] = ~done

    def phase_completed(self) -> None:
        """Who waits for an mbarrier looks again."""
        self.stalled[:] = False

    def local_index(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Byte offsets into each thread's own memory."""
        offsets = addresses.astype(np.int64) - LOCAL_BASE
        if ((offsets < 0) | (offsets + width > self.local.shape[1])).any() or (offsets & (width - 1)).any():
            raise Fault(f"local address out of range or misaligned: {offsets.min()} of {self.local.shape[1]} bytes")
        return offsets

    def space_of(self, addresses: np.ndarray) -> str:
        """The state space of generic addresses, which must agree."""
        first = int(addresses.min())
        if SHARED_BASE <= first < LOCAL_BASE or PEER <= first < (MOST_PEERS + 2) * PEER:
            return "shared"
        return "local" if first < LOCAL_BASE << 1 else "global"


def _alike(go):
    return go.all() or not go.any()
