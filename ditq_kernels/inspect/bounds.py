"""How long a counted launch takes at least, by what GPUs are published to do. A bound is no prediction: a kernel that
waits, or issues more than is counted, takes longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .counted import Count
from .machine_code import MACS_PER_CLOCK, SCHEDULERS

SHARED_BYTES = 128  # that a multiprocessor's shared memory reads or writes in a clock
# Clocks from asking L2 to its answer, at least: 261 to 273 on an A100, an H100 and an RTX 4090 (Luo et al., arXiv
# 2402.13499), 222 to 339 by place on an L40 (arXiv 2606.22588).
L2_LATENCY = 220


@dataclass(frozen=True)
class Gpu:
    """Attributes:
    multiprocessors: it also decides which configuration is chosen, and the grids of persistent kernels.
    clock_ghz: at which the vendor's peak rates are given.
    memory_gbs: of the memory's interface.
    l2_bytes: that all multiprocessors together read from L2 in a clock.
    wide_macs: multiply-accumulates a clock and multiprocessor of 16-bit operands whose sums are fp32, which GeForce
        boards make at half the rate of :data:`.machine_code.MACS_PER_CLOCK`.
    l2_size: bytes that L2 holds.
    """

    name: str
    multiprocessors: int
    clock_ghz: float
    memory_gbs: float
    l2_bytes: int
    wide_macs: int
    l2_size: int


# By architecture. Sources: NVIDIA's whitepapers of GA100 (5120 bytes a clock from L2), AD102, GH100 and GB202. Of the
# later three no rate of L2 is published: 64 bytes a clock and multiprocessor, which one can take in, is more than it
# gives.
GPUS = {
    80: Gpu("A100 SXM 80 GB", 108, 1.41, 2039, 5120, 1024, 40 << 20),
    89: Gpu("GeForce RTX 4090", 128, 2.52, 1008, 64 * 128, 256, 72 << 20),
    90: Gpu("H100 SXM", 132, 1.83, 3350, 64 * 132, 2048, 50 << 20),
    120: Gpu("GeForce RTX 5090", 170, 2.41, 1792, 64 * 170, 256, 96 << 20),
}


def bounds(count: Count, gpu: Gpu | None = None) -> dict[str, float]:
    """Microseconds that each resource takes at least: "matrix units", "issue slots" and "shared memory" on the
    multiprocessors that have the most tiles, each an average one; "L2" and "memory" of what goes through them, the
    memory's being what is touched of each tensor, once, if nothing of it is in L2 before; "latency" of the answers of
    L2 that such a multiprocessor waits for one after the other: the operands of a tile's steps come into as many places
    as there are stages, and those of tiles that are resident together at the same time.

    Args:
        gpu: None takes the architecture's of :data:`GPUS`.
    """
    gpu = gpu or GPUS[count.arch]
    clocks_a_us = gpu.clock_ghz * 1e3
    share = math.ceil(count.tiles / gpu.multiprocessors) / count.tiles  # of all work, on the fullest multiprocessor
    rates = {"s8": MACS_PER_CLOCK[count.arch][0], "f16": gpu.wide_macs, "bf16": gpu.wide_macs}
    matrix = sum(number / rates[kind] for kind, number in count.macs.items())
    slots = sum(count.issued.values()) * count.warps * count.tiles / SCHEDULERS
    at_once = min(count.resident, math.ceil(count.blocks_in_grid / gpu.multiprocessors))
    rounds = math.ceil(math.ceil(count.tiles / gpu.multiprocessors) / at_once)
    turns = math.ceil(rounds * count.steps / count.stages)  # what is fetched may run on from tile to tile
    shared = sum(count.passes.values()) + count.engines / SHARED_BYTES
    return {
        "matrix units": share * matrix / clocks_a_us,
        "issue slots": share * slots / clocks_a_us,
        "shared memory": share * shared / clocks_a_us,
        "L2": sum(count.fetched.values()) / gpu.l2_bytes / clocks_a_us,
        "memory": count.touched / gpu.memory_gbs / 1e3,
        "latency": turns * L2_LATENCY / clocks_a_us,
    }


def plain_bound(rows: int, out_features: int, in_features: int, gpu: Gpu) -> float:
    """Microseconds that a product of 16-bit matrices, such as cuBLAS computes, takes at least, by its matrix units and
    its memory alone: of its kernels nothing is counted.
    """
    macs = rows * out_features * in_features
    matrix = macs / gpu.wide_macs / gpu.multiprocessors / gpu.clock_ghz / 1e3
    moved = 2 * (rows * in_features + out_features * in_features + rows * out_features)
    return max(matrix, moved / gpu.memory_gbs / 1e3)
