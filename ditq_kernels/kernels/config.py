"""Which kernels a product may run on, and in which forms: one problem, one config, one validity predicate. Pure
Python; nothing is compiled, launched or measured here.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ..layer.error_budget import PLAIN, Arithmetic
from ..layer.formats import WEIGHT_FORMATS, WeightFormat
from ..layer.packing import HALF_BLOCK

MAX_ACTIVATION_BLOCK = 16384  # columns that one program of a row-wise kernel holds at once
SMALL_M = 16  # up to here a product is bound by reading weights
SCRATCH_BYTES = 96 << 20  # what a weight is decoded into at a time: stretches cost more than the L2 cache saves
# Shared memory of one thread block in bytes, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Products are chosen for the upper bound of M's class, so that a new M rarely means a new kernel.
ROW_CLASSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def family(capability: int) -> int:
    """The major version, whose devices share matrix and copy instructions: 10 of 100 and of 103."""
    return capability // 10


def shared_memory(capability: int) -> int:
    """Bytes that one thread block may use on ``capability``; where it is not listed, the least of its
    family, or of any.
    """
    if capability in SHARED_MEMORY:
        return SHARED_MEMORY[capability]
    related = [size for known, size in SHARED_MEMORY.items() if family(known) == family(capability)]
    return min(related or SHARED_MEMORY.values())


def cdiv(extent: int, block: int) -> int:
    """Blocks that cover ``extent``. Triton's own costs a few microseconds a call outside of kernels."""
    return -(-extent // block)


def row_class(rows: int) -> int:
    """The smallest class of row counts that holds ``rows``; the largest holds all above it."""
    return ROW_CLASSES[min(bisect.bisect_left(ROW_CLASSES, rows), len(ROW_CLASSES) - 1)]


def columns_per_part(fmt: WeightFormat) -> int:
    """Columns of a half-block that one matrix product takes: all 64, or as many as lie in one group."""
    return min(HALF_BLOCK, fmt.group or HALF_BLOCK)


@dataclass(frozen=True)
class Problem:
    """What a configuration is chosen by.

    Attributes:
        rows: a value of :data:`ROW_CLASSES`.
        activation_bytes: 1 for int8, 2 for 16-bit, 4 for fp32 activations.
        capability: 10 * major + minor.
        multiprocessors: of the device.
        output_bytes: of one element of the result: 2, or 4 for fp32 and for accumulators as they are.
        adds: whether the product is added to a residual.
    """

    rows: int
    out_features: int
    in_features: int
    activation_bytes: int
    fmt: WeightFormat
    capability: int
    multiprocessors: int
    output_bytes: int = 2
    adds: bool = False


@dataclass(frozen=True)
class Config:
    """One compiled form of a product.

    Attributes:
        route: the way it is carried out, a key of :data:`CONFIGS`.
        block_m, block_n, block_k: rows, outputs and inputs of a tile; ``block_k`` of routes that choose it.
        num_warps, num_stages: Triton's options.
        descriptors: whether tiles are copied by tensor descriptors (TMA) and not by pointers.
        instance: of the CUDA extension's table of tiles.
    """

    route: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 1
    descriptors: bool = False
    instance: int = 0

    def __str__(self) -> str:
        if self.route in EXTENSION_ROUTES:
            return f"{self.route} instance {self.instance}"
        tile = "x".join(str(side) for side in (self.block_m, self.block_n, self.block_k) if side)
        warps = f" warps={self.num_warps} stages={self.num_stages}" if tile else ""
        return f"{self.route} {tile}{warps}{' descriptors' if self.descriptors else ''}".strip()


OVERLAPPED_ROUTES = ("overlapped", "expanded_overlapped")
OVERLAPPED_CAPABILITY = 90  # its instructions are of sm_90a, and of no other
# Routes of the CUDA extension, and instances of its int8 product: the places of extension.TILES, which a test holds
# together with this.
EXTENSION_ROUTES = ("cuda", "expanded_cuda")
EXTENSION_TILES = 8

# What each route may be run with; `ditq tune` measures these. The keys are the routes:
# small     reads each weight once, multiplies without matrix instructions
# in_loop   decodes the weights in the loop of the matrix product
# int8      int8 weights as they are stored
# expanded  decodes the weights into a scratch first and multiplies that; by cuBLAS where no tile is given
# overlapped     int8 weights as they are stored, by the kernel whose products overlap with all else
# cuda      the CUDA extension's kernel
# expanded_overlapped, expanded_cuda  these of weights that are decoded into a scratch first
_DENSE_TILES = (
    Config("", 128, 256, 128, 8, 3),
    Config("", 128, 128, 128, 8, 3),
    Config("", 128, 128, 128, 8, 2),
    Config("", 64, 128, 128, 4, 4),
    Config("", 64, 128, 128, 4, 3),
    Config("", 64, 64, 128, 4, 4),
    Config("", 32, 64, 128, 4, 4),
    Config("", 128, 256, 64, 8, 3),
    Config("", 128, 128, 64, 8, 3),
    Config("", 128, 128, 64, 8, 2),
    Config("", 64, 128, 64, 4, 4),
    Config("", 64, 64, 64, 4, 4),
)


# Eight warps that multiply (and four, of which one fetches): as one consumer, or as two with tiles of their own.
_OVERLAPPED_TILES = (
    Config("", 128, 256, 128, 8, 4),
    Config("", 256, 128, 128, 8, 4),
    Config("", 128, 128, 128, 4, 6),
    Config("", 64, 256, 128, 4, 5),
    Config("", 64, 128, 128, 4, 8),
)


def _dense(route: str) -> tuple[Config, ...]:
    """The tiles of a product of dense operands, copied by tensor descriptors and by pointers."""
    return tuple(
        dataclasses.replace(tile, route=route, descriptors=descriptors)
        for descriptors in (True, False)
        for tile in _DENSE_TILES
    )


CONFIGS: dict[str, tuple[Config, ...]] = {
    "small": (
        Config("small", 1, 4, num_warps=1),
        Config("small", 1, 8, num_warps=1),
        Config("small", 2, 4, num_warps=1),
        Config("small", 2, 8, num_warps=1),
        Config("small", 4, 4, num_warps=1),
    ),
    "in_loop": (
        Config("in_loop", 128, 128, 0, 8, 3),
        Config("in_loop", 128, 128, 0, 8, 2),
        Config("in_loop", 64, 128, 0, 4, 3),
        Config("in_loop", 64, 128, 0, 8, 2),
        Config("in_loop", 64, 64, 0, 4, 4),
        Config("in_loop", 32, 64, 0, 4, 4),
        Config("in_loop", 16, 64, 0, 4, 4),
    ),
    "int8": _dense("int8"),
    "expanded": (Config("expanded"), *_dense("expanded")),
    **{
        route: tuple(dataclasses.replace(tile, route=route, descriptors=True) for tile in _OVERLAPPED_TILES)
        for route in OVERLAPPED_ROUTES
    },
    **{
        route: tuple(Config(route, instance=instance) for instance in range(EXTENSION_TILES))
        for route in EXTENSION_ROUTES
    },
}


def by_pointers(config: Config) -> Config:
    """What computes instead of ``config``, whose operands descriptors are to read, where they cannot: the same tile, or
    of an overlapped product the largest of no more outputs.
    """
    if config.route not in OVERLAPPED_ROUTES:
        return dataclasses.replace(config, descriptors=False)
    plain = CONFIGS["expanded" if config.route.startswith("expanded") else "int8"]
    area = config.block_m * config.block_n
    return next(tile for tile in plain if not tile.descriptors and 0 < tile.block_m * tile.block_n <= area)


LARGEST_ADDED = 128 * 128  # tile of a persistent program, that adds a residual


def adds_residuals(config: Config) -> bool:
    """Whether what a product is added to is added where it is stored, and not by a pass of its own. With the largest
    tiles a persistent program has no registers for it (ptxas spills 14 on sm_90).
    """
    if config.route in OVERLAPPED_ROUTES:
        return True
    has_registers = not config.descriptors or config.block_m * config.block_n <= LARGEST_ADDED
    return config.route in ("in_loop", "int8", "expanded") and config.block_m > 0 and has_registers


# The gradient's reduced side is short: with 32 outputs a step, sm_80 and sm_120 run out of registers on 8-bit weights.
GRADIENT_TILE = Config("gradient", block_m=64, block_n=16, num_warps=8, num_stages=2)


def arithmetic(config: Config, activation_bytes: int) -> Arithmetic:
    """What ``config`` does to numbers, for the oracle that judges it; ``activation_bytes`` as in :class:`Problem`."""
    # Sums of int8 are exact, and fp32 products are left to cuBLAS, which has no matrix instruction for them.
    if activation_bytes != 2 or config.route == "small":
        return PLAIN
    dense = config.route in ("expanded", "gradient")
    cublas = config.route == "expanded" and not config.block_m
    return Arithmetic(rounds_weight=dense, rounds_bias=cublas, matrix_instructions=True)


BARRIER_BYTES = 64
BARRIERS_BYTES, STAGED_BYTES = 512, 16384  # of an overlapped product
WARPGROUP_FAMILIES = (9, 10)  # matrix instructions of warpgroups, which read operands from shared memory
WARPGROUP_ROWS = 64  # of Hopper's matrix instruction
# (group, block_m, num_warps) of decoding in the loop that ptxas, on sm_80, holds to two registers less than it takes.
TOO_FEW_REGISTERS = {(2 * HALF_BLOCK, 64, 8), (32, 32, 4)}
CONSUMER_WARPS = 8  # that multiply in an overlapped product, as one consumer or as two
SWIZZLE_BYTES = 128  # of a tile's row in shared memory: the widest that is read without bank conflicts


def shared_bytes(config: Config, problem: Problem) -> int:
    """Shared memory of the loop's operands, all stages, and of what is stored while they are loaded."""
    if config.route == "small":
        return 0
    if config.route == "in_loop":
        weights = config.block_n * HALF_BLOCK * (2 if problem.fmt.bits == 8 else 1)
        return config.num_stages * (2 * config.block_m * HALF_BLOCK * problem.activation_bytes + weights)
    # A persistent program stores one tile while it loads the next, so that the two cannot share memory.
    if config.route in OVERLAPPED_ROUTES:
        # 16-bit results pass through shared memory, a part of a tile at a time.
        output = BARRIERS_BYTES + (STAGED_BYTES if problem.output_bytes == 2 else 0)
    else:
        output = config.block_m * config.block_n * problem.output_bytes + BARRIER_BYTES if config.descriptors else 0
    return config.num_stages * (config.block_m + config.block_n) * config.block_k * problem.activation_bytes + output


def _registers_suffice(config: Config, problem: Problem) -> bool:
    """Whether accumulators and what must stand beside them fit a thread's registers: as `ditq inspect` saw them do."""
    if config.route == "small":
        return True
    accumulators = config.block_m * config.block_n // (32 * config.num_warps)
    warpgroups = family(problem.capability) in WARPGROUP_FAMILIES
    if config.route != "in_loop":
        return accumulators <= (128 if warpgroups else 64)
    # Decoded in the loop. Without warpgroup instructions the activations pass through registers as well.
    if problem.fmt.promoted:
        integer, tile = problem.activation_bytes == 1, (config.block_m, config.num_warps)
        if integer and family(problem.capability) == 8 and (problem.fmt.group, *tile) in TOO_FEW_REGISTERS:
            return False
        accumulators *= 2  # the partial sum beside the total
        if problem.activation_bytes > 1:
            accumulators *= 2 if warpgroups or config.block_n <= 64 else 4
    elif problem.fmt.bits == 4 and not warpgroups and config.num_stages > 2:
        accumulators *= 2
    return accumulators <= (128 if warpgroups or problem.fmt.promoted else 64)


def _route_is_valid(config: Config, problem: Problem) -> bool:
    """Whether the route computes the problem at all."""
    fmt, integer = problem.fmt, problem.activation_bytes == 1
    if config.route == "small":
        return not integer and problem.rows <= config.block_m
    if config.route == "in_loop":
        return problem.activation_bytes <= 2
    if config.route == "int8":
        return integer and fmt.bits == 8 and not fmt.promoted
    if config.route == "expanded" and integer:
        return fmt.two_level and config.block_m > 0  # cuBLAS would leave scales and bias to another pass
    if config.route == "expanded":
        # fp32 products are cuBLAS': on sm_100 Triton 3.7 rounds the operands to TF32, whatever precision is asked for.
        return problem.activation_bytes == 2 or not config.block_m
    if config.route in OVERLAPPED_ROUTES:
        stored = fmt.two_level if config.route.startswith("expanded") else fmt.bits == 8 and not fmt.promoted
        return integer and stored and problem.capability == OVERLAPPED_CAPABILITY
    if config.route == "expanded_cuda" and not (integer and fmt.two_level):
        return False
    return config.route in EXTENSION_ROUTES and _extension_computes(config, problem)


def _extension_computes(config: Config, problem: Problem) -> bool:
    """Whether the CUDA extension is there and has the product; activations and output are taken to be bf16."""
    import torch

    from ..layer import extension

    shape = (problem.rows, problem.out_features, problem.in_features)
    if problem.activation_bytes == 1:
        fmt = WEIGHT_FORMATS["w8"] if config.route == "expanded_cuda" else problem.fmt  # what the scratch holds
        reason = extension.why_unsupported_a8(*shape, fmt, torch.bfloat16, problem.capability)
    else:
        dtype = torch.bfloat16 if problem.activation_bytes == 2 else torch.float32
        reason = extension.why_unsupported_a16(*shape, problem.fmt, dtype, problem.capability)
        reason = reason or (f"no instance {config.instance}" if config.instance else None)
    return reason is None and extension.why_unavailable() is None


def is_valid(config: Config, problem: Problem) -> bool:
    """Whether ``config`` computes ``problem`` and fits its shared memory and registers."""
    if not _route_is_valid(config, problem):
        return False
    if config.route.startswith("expanded") and problem.rows <= SMALL_M and problem.activation_bytes <= 2:
        return False  # the scratch would cost more than the product
    if config.block_k and config.block_k * problem.activation_bytes != SWIZZLE_BYTES:
        return False
    if config.descriptors and family(problem.capability) not in WARPGROUP_FAMILIES:
        return False  # sm_80 has no copy engine; without warpgroups, on sm_120, the loop is five times as long
    if config.descriptors and problem.in_features * problem.activation_bytes % 16:
        return False  # the copy engine wants rows of whole 16 bytes
    if config.block_k and config.block_m < WARPGROUP_ROWS and family(problem.capability) == 9:
        return False  # the older matrix instruction reaches three quarters of Hopper's rate
    decodes_to_16_bits = config.route == "in_loop" and problem.fmt.bits == 4 and problem.activation_bytes > 1
    if decodes_to_16_bits and config.block_m > 64 and family(problem.capability) == 10:
        return False  # spills, and with groups of 32 Triton 3.7 leaves out the whole product
    if config.block_m * config.block_n >= 128 * 256 and family(problem.capability) == 10 and not config.descriptors:
        return False  # addresses and masks are too many for the registers
    return shared_bytes(config, problem) <= shared_memory(problem.capability) and _registers_suffice(config, problem)


def candidates(problem: Problem) -> Iterator[Config]:
    """Every valid configuration."""
    return (config for route in CONFIGS.values() for config in route if is_valid(config, problem))
