"""Threads among each other: barriers, fences, shuffles, votes and reductions over a warp."""

from __future__ import annotations

import numpy as np

from .faults import WARP, Fault, Unsupported
from .operands import DTYPE, destination, opcode, source
from .register_pool import UNIT
from .syntax import Immediate, Pair

LEAST_REGISTERS, MOST_REGISTERS = 24, 256  # of a thread, that setmaxnreg may say


@opcode("bar", "barrier")
def barrier(instruction, kernel):
    """bar.warp.sync; bar.sync and bar.arrive, also spelled barrier{.cta}; barrier.cluster."""
    if "warp" in instruction.parts:
        return lambda m, mask: m.whole_warps(mask)
    if instruction.parts[1] == "cluster":
        return _cluster_barrier(instruction.parts)
    number, *count = (source(operand, "u32", kernel) for operand in instruction.operands)
    waits = "sync" in instruction.parts

    def run(m, mask):
        threads = int(count[0](m)[0]) if count else None
        which = number(m)
        if which.size == 1:
            return m.thread_barriers.reach(mask, int(which[0]), threads, waits)
        for one in np.unique(which[m.chosen(mask)]):  # as warps compute it: those of a warpgroup have their own
            here = which == one if mask is None else mask & (which == one)
            m.whole_warps(here)
            m.thread_barriers.reach(here, int(one), threads, waits)

    return run


def _cluster_barrier(parts):
    arrives, relaxed, aligned = "arrive" in parts, "relaxed" in parts, "aligned" in parts

    def run(m, mask):
        if aligned:
            m.whole_warps(mask)
        if arrives:
            m.cluster_barriers.arrive(mask, relaxed)
        else:
            m.cluster_barriers.wait(mask)

    return run


@opcode("fence")
def fence(instruction, kernel):
    """Two kinds order more than this machine does already: the fence between the generic and the async proxy of shared
    memory, and, before a relaxed arrival at the barrier of a cluster, those that order what other blocks see.
    """
    parts = instruction.parts
    if parts[-1] in ("cluster", "gpu", "sys") and "acquire" not in parts:
        return lambda m, mask: m.clocks.publish(m.rows(mask))
    if parts[:3] != ("fence", "proxy", "async") or (len(parts) > 3 and not parts[3].startswith("shared")):
        return nothing(instruction, kernel)
    return lambda m, mask: m.clocks.fence(m.rows(mask))


def partners(mode, lane, operand):
    return {
        "bfly": lambda: lane ^ operand,
        "idx": lambda: operand,
        "up": lambda: lane - operand,
        "down": lambda: lane + operand,
    }[mode]()


def _of(m, read, mask):
    """What ``read`` gives the lanes in ``mask``."""
    value = read(m)
    return value if value.size == 1 else value[m.chosen(mask)]


@opcode("shfl")
def shuffle(instruction, kernel):
    mode = instruction.parts[2]
    result, value, which, clamp, members = instruction.operands
    whole = Immediate(0 if mode == "up" else 31)  # the clamp of a shuffle within the whole warp
    if isinstance(clamp, Immediate) and clamp != whole:
        raise Unsupported(instruction.text)
    clamp, members = source(clamp, "b32", kernel), source(members, "b32", kernel)
    into, valid = (result.first, result.second) if isinstance(result, Pair) else (result, None)
    keep, read, which = destination(into, kernel), source(value, "b32", kernel), source(which, "b32", kernel)
    keep_valid = destination(valid, kernel) if valid else None

    def run(m, mask):
        m.whole_warps(mask)
        if (_of(m, clamp, mask) != np.uint32(whole.bits)).any():
            raise Unsupported("a shuffle within part of a warp")
        if (_of(m, members, mask) != np.uint32(0xFFFFFFFF)).any():
            raise Fault("a shuffle among part of a warp")
        values = m.spread(read(m))
        lane = np.arange(m.lanes)
        other = partners(mode, lane % WARP, m.spread(which(m) & np.uint32(WARP - 1)).astype(np.int64))
        inside = (other >= 0) & (other < WARP)
        other = np.where(inside, other, lane % WARP) + lane // WARP * WARP
        keep(m, values[other], mask)
        if keep_valid:
            keep_valid(m, inside, mask)

    return run


@opcode("redux")
def reduce_warp(instruction, kernel):
    function = {"max": np.max, "min": np.min, "add": np.sum, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce}
    operation, kind = function[instruction.parts[2]], instruction.parts[-1]
    keep, read = destination(instruction.operands[0], kernel), source(instruction.operands[1], kind, kernel)
    members = source(instruction.operands[2], "u32", kernel)

    def run(m, mask):
        m.whole_warps(mask)
        if (members(m) != np.uint32(0xFFFFFFFF)).any():
            raise Fault("a reduction over part of a warp")
        found = operation(m.spread(read(m)).reshape(-1, WARP), 1).astype(DTYPE[kind])
        keep(m, np.repeat(found, WARP), mask)

    return run


@opcode("elect")
def elect(instruction, kernel):
    result = instruction.operands[0]
    keep, keep_leader = destination(result.second, kernel), destination(result.first, kernel)

    def run(m, mask):
        m.whole_warps(mask)
        keep(m, m.special["%laneid"] == 0, mask)
        keep_leader(m, np.zeros(1, np.uint32), mask)

    return run


@opcode("setmaxnreg")
def set_registers(instruction, kernel):
    count, takes = instruction.operands[0].bits, instruction.parts[1] == "inc"
    if not LEAST_REGISTERS <= count <= MOST_REGISTERS or count % UNIT:
        raise Fault(f"{count} registers of a thread [{instruction.text}]")

    def run(m, mask):
        pool = m.register_pool
        (pool.take if takes else pool.give_up)(mask, count)

    return run


@opcode("membar", "griddepcontrol", "nanosleep", "discard", "prefetch")
def nothing(instruction, kernel):
    """What changes when things happen, and no value."""
    return lambda m, mask: None


@opcode("trap")
def trap(instruction, kernel):
    def run(m, mask):
        if m.chosen(mask).size:
            raise Fault("the kernel traps")

    return run
