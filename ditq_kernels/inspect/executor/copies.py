"""Copies into shared memory that arrive later: cp.async, and by the tensor copy engine; and what they signal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .faults import PARAMETER_BASE, PEER, UNSIGNED, Fault, Unsupported
from .global_memory import Region
from .operands import address_of, destination, opcode, source
from .syntax import SINK


@dataclass
class TensorMap:
    """What a tensor descriptor says: a matrix [rows, columns] of unsigned elements, of which boxes are copied.

    Attributes:
        swizzle: 0 none, 1, 2, 3: over 32, 64, 128 bytes.
    """

    region: Region
    matrix: np.ndarray
    box: tuple[int, int]
    swizzle: int


@opcode("cp")
def copy(instruction, kernel):
    parts = instruction.parts
    if parts[1:3] == ("async", "bulk"):
        return tensor_copy(instruction, kernel)
    if parts[2] == "commit_group":
        return lambda m, mask: m.copies.commit(mask)
    if parts[2] == "wait_all":
        return lambda m, mask: m.copies.wait(None, mask)
    if parts[2] == "wait_group":
        newest = instruction.operands[0].bits
        return lambda m, mask: m.copies.wait(newest, mask)
    into, of, size, *rest = instruction.operands
    width = size.bits
    bytes_read = source(rest[0], "u32", kernel) if rest else lambda m: np.full(1, width, np.uint32)
    into, of = address_of(into, "u32", kernel), address_of(of, "u64", kernel)

    def run(m, mask):
        lanes = m.chosen(mask)
        if not lanes.size:
            return
        wanted = m.spread(bytes_read(m))[lanes]
        if not np.isin(wanted, (0, width)).all():
            raise Fault(f"a copy of {wanted.max()} of {width} bytes")
        values = np.zeros(len(lanes), UNSIGNED[width])
        real = wanted > 0
        if real.any():
            at = m.spread(of(m))[lanes][real]
            m.count_global("copy", at, width, lanes[real])
            values[real] = m.memory.load(at, width)
        at = m.spread(into(m))[lanes]
        m.count_shared("copy", at, width, lanes)
        m.copies.start(lanes, m.shared.index(at, width, lanes), width, values)

    return run


def swizzled(addresses: np.ndarray, mode: int) -> np.ndarray:
    """Byte addresses of 16-byte chunks as the copy engine and wgmma permute them; ``mode`` 1, 2, 3 for 32, 64, 128."""
    return addresses ^ (((addresses >> 7) & ((1 << mode) - 1)) << 4) if mode else addresses


def tensor_copy(instruction, kernel):
    """cp.async.bulk.tensor.2d from global to shared memory, of the own block or of several of its cluster. How long
    caches keep what was read changes no value.
    """
    into, tensor, signal, *rest = instruction.operands
    multicast = "multicast::cluster" in instruction.parts
    if len(rest) != multicast + ("L2::cache_hint" in instruction.parts):
        raise Unsupported(instruction.text)
    to_ranks = source(rest[0], "u16", kernel) if multicast else None
    into, signal = address_of(into, "u32", kernel), address_of(signal, "u32", kernel)
    handle = source(tensor.base, "u64", kernel)
    column, row = (source(o, "s32", kernel) for o in tensor.coordinates[0].parts)

    def run(m, mask):
        for lane in m.chosen(mask):
            at = [int(m.spread(read(m))[lane]) for read in (into, signal, handle, column, row)]
            ranks = _ranks(int(m.spread(to_ranks(m))[lane]), m.cluster) if multicast else None
            _copy_box(m, int(lane), *at, ranks)

    return run


def _ranks(mask, cluster):
    """The blocks of the cluster that a multicast names."""
    if not mask or mask >> cluster:
        raise Fault(f"a multicast to the blocks {mask:#x} of a cluster of {cluster}")
    return [rank for rank in range(cluster) if mask >> rank & 1]


def _box(tensor, row, column):
    """[rows, columns] of the matrix from a place on, zeros outside of it, and how many bytes of it lie inside."""
    rows, columns = tensor.box
    box = np.zeros((rows, columns), tensor.matrix.dtype)
    height, width = tensor.matrix.shape
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + rows, height), min(column + columns, width)
    if bottom > top and right > left:
        box[top - row : bottom - row, left - column : right - column] = tensor.matrix[top:bottom, left:right]
    return box, max(0, bottom - top) * max(0, right - left) * box.itemsize


def _copy_box(m, lane, into, signal, handle, column, row, ranks):
    """``ranks``: the blocks of the cluster that it goes to, the same place in each; None: only the lane's own."""
    if max(into, signal) >= PEER:
        raise Unsupported("a tensor copy to an address of another block")
    number = (handle - PARAMETER_BASE) // 256
    parameters = m.program.kernel.parameters
    tensor = m.parameters[parameters[number].name] if 0 <= number < len(parameters) else None
    if not isinstance(tensor, TensorMap):
        raise Fault("a tensor copy without a tensor map")
    box, inside = _box(tensor, row, column)
    line = box.shape[1] * box.itemsize
    if into % 128 or (tensor.swizzle and line > 16 << tensor.swizzle):
        raise Fault(f"a tensor copy to {into:#x} of rows of {line} bytes")
    addresses = swizzled(into + np.arange(0, box.shape[0] * line, 16), tensor.swizzle)
    values = box.reshape(-1).view(UNSIGNED[16])
    if m.counters:
        m.counters.fetched[tensor.region.name] += inside
    own = lane // m.threads
    for block in [own] if ranks is None else [own // m.cluster * m.cluster + rank for rank in ranks]:
        barrier = m.mbarriers.at(block, signal)
        further = (block % m.cluster + 1) * PEER  # the same place in that block
        m.shared.signal_by_engine(signal + further, lane, barrier.agent, barrier.next_step)
        if m.counters:
            m.counters.engines += box.nbytes
        m.shared.copy_by_engine(addresses + further, values, lane, barrier.agent, barrier.next_step)
        # It may be done at once: nobody can tell, since what it wrote is known to those only who have waited for it.
        barrier.bytes_due -= box.nbytes
        if barrier.settle():
            m.phase_completed()


@opcode("mbarrier")
def mbarrier(instruction, kernel):
    """init, inval, arrive (also with bytes to come) and try_wait or test_wait of a parity."""
    parts, operands = instruction.parts, instruction.operands
    action = parts[1]
    if action == "init":
        return _initialise(address_of(operands[0], "u32", kernel), source(operands[1], "u32", kernel))
    if action == "inval":
        return _invalidate(address_of(operands[0], "u32", kernel))
    return (_arrive if action == "arrive" else _wait)(instruction, kernel)


def _initialise(where, count):
    def run(m, mask):
        at, expected = m.spread(where(m)), m.spread(count(m))
        for lane in m.chosen(mask):
            lanes = np.full(1, lane)
            m.shared.store(at[lanes], 8, np.zeros(1, np.uint64), lanes)
            m.mbarriers.initialise(int(lane) // m.threads, int(at[lane]), int(expected[lane]))

    return run


def _invalidate(where):
    def run(m, mask):
        at = m.spread(where(m))
        for lane in m.chosen(mask):
            lanes = np.full(1, lane)
            m.shared.store(at[lanes], 8, np.zeros(1, np.uint64), lanes)
            m.mbarriers.invalidate(int(lane) // m.threads, int(at[lane]))

    return run


def _arrive(instruction, kernel):
    where = address_of(instruction.operands[1], "u32", kernel)
    rest = [source(operand, "u32", kernel) for operand in instruction.operands[2:]]
    expects, peers = "expect_tx" in instruction.parts, "shared::cluster" in instruction.parts
    if peers and instruction.operands[0] != SINK:
        raise Unsupported(instruction.text)  # there is no state of another block's mbarrier

    def run(m, mask):
        at = m.spread(where(m))
        lanes = m.chosen(mask)
        if not lanes.size:
            return
        m.shared.touch(at[lanes], 8, lanes, "arrives at", peers)
        numbers = m.spread(rest[0](m))[lanes].tolist() if rest else [1] * len(lanes)
        blocks, own = m.shared.place(at[lanes], lanes)
        for lane, block, address, number in zip(lanes, blocks.tolist(), own.tolist(), numbers, strict=True):
            count, due = (1, number) if expects else (number, 0)
            if m.mbarriers.arrive(block, address, int(m.row_of_lane[lane]), count, due):
                m.phase_completed()

    return run


def _wait(instruction, kernel):
    keep = destination(instruction.operands[0], kernel)
    where, parity = address_of(instruction.operands[1], "u32", kernel), source(instruction.operands[2], "u32", kernel)

    def run(m, mask):
        lanes = m.chosen(mask)
        at, wanted = m.spread(where(m)), m.spread(parity(m)) & np.uint32(1)
        m.shared.touch(at[lanes], 8, lanes, "waits at")
        done, early = np.zeros((2, m.lanes), np.bool_)
        for block in np.unique(m.cta_of_lane[lanes]):
            here = lanes[m.cta_of_lane[lanes] == block]
            for address, phase in sorted({(int(at[lane]), int(wanted[lane])) for lane in here}):
                which = here[(at[here] == address) & (wanted[here] == phase)]
                asked = int(block), address, phase, np.unique(m.row_of_lane[which])
                if m.mbarriers.asks_early(*asked):
                    early[which] = True
                elif m.mbarriers.wait(*asked):
                    done[which] = True
        m.waited(lanes, (done | early)[lanes])
        keep(m, done, mask)

    return run
