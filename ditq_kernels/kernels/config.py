"""Which tile a product runs on: one config dataclass, one validity predicate, one heuristic. Pure Python; no Triton, no
measurement.

The tables hold heuristics. None of them was measured on a GPU yet.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch

from ..formats import WeightFormat
from ..packing import HALF_BLOCK

MAX_ACTIVATION_BLOCK = 8192  # columns that one program of the activation quantizer holds at once
SMALL_M = 16  # up to here a product is bound by reading weights and does without matrix instructions
SMALL_STAGES = 3
# Shared memory of one thread block in bytes, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def shared_memory(capability: int) -> int:
    """Bytes that one thread block may use on ``capability``; of one not listed, the smallest that any has."""
    return SHARED_MEMORY.get(capability, min(SHARED_MEMORY.values()))


@dataclass(frozen=True)
class TileConfig:
    """One compiled form of a product: rows and outputs of a tile, warps, and loop iterations in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, activation_bytes: int, fmt: WeightFormat) -> int:
        """Shared memory of the loop's operands: per stage both halves of the activations and the stored weights."""
        part = columns_per_part(fmt)
        weights = self.block_n * part * (2 if fmt.bits == 8 else 1)
        return self.num_stages * (2 * self.block_m * part * activation_bytes + weights)


def columns_per_part(fmt: WeightFormat) -> int:
    """Columns of a half-block that one loop step handles: all 64, or as many as lie in one group."""
    return min(HALF_BLOCK, fmt.group or HALF_BLOCK)


def is_valid(config: TileConfig, activation_bytes: int, fmt: WeightFormat, capability: int) -> bool:
    """Whether ``config`` fits the shared memory of ``capability`` (10 * major + minor) and keeps its accumulator in
    registers.
    """
    registers = config.block_m * config.block_n // (32 * config.num_warps)
    if fmt.promoted:
        registers *= 2  # the partial sum beside the total
        if activation_bytes > 1:
            registers *= 2  # and wider operands beside both: at 128 x 128 with 8 warps, sm_120 spills
    return config.shared_bytes(activation_bytes, fmt) <= shared_memory(capability) and registers <= 128


# In order of preference, by the largest M that they serve.
TILES: tuple[tuple[int | None, tuple[TileConfig, ...]], ...] = (
    (32, (TileConfig(32, 64, 4, 4), TileConfig(32, 64, 4, 2))),
    (128, (TileConfig(64, 64, 4, 4), TileConfig(64, 64, 4, 2))),
    (512, (TileConfig(64, 128, 4, 3), TileConfig(64, 128, 4, 2), TileConfig(64, 64, 4, 2))),
    (
        None,
        (TileConfig(128, 128, 8, 3), TileConfig(128, 128, 8, 2), TileConfig(64, 128, 8, 2), TileConfig(64, 64, 4, 2)),
    ),
)


@functools.cache
def choose_tile(rows: int | None, activation_bytes: int, fmt: WeightFormat, capability: int) -> TileConfig:
    """The first valid tile for ``rows``, a value of :func:`tile_class`."""
    for limit, tiles in TILES:
        if limit == rows:
            return next(tile for tile in tiles if is_valid(tile, activation_bytes, fmt, capability))
    raise ValueError(f"{rows} is not a class of row counts; they are {[limit for limit, _ in TILES]}")


def tile_class(rows: int) -> int | None:
    """The bound of the class of row counts that ``rows`` belongs to: kernels are compiled per class, not per M."""
    return next(limit for limit, _ in TILES if limit is None or rows <= limit)


@dataclass(frozen=True)
class SmallConfig:
    """One compiled form of the small-M product: rows (a power of two), outputs of a program, warps."""

    block_m: int
    block_n: int
    num_warps: int


# The product of rows, outputs and columns of a part is what a program holds in registers.
SMALL_TILES = {rows: SmallConfig(rows, max(4, 16 // rows), 4) for rows in (1, 2, 4, 8, 16)}


def choose_small(rows: int) -> SmallConfig:
    """The smallest row count that holds ``rows`` <= 16."""
    return next(config for limit, config in SMALL_TILES.items() if rows <= limit)


# The reduced side is short: with 32 outputs a step, sm_80 and sm_120 run out of registers on 8-bit weights.
GRADIENT_TILE = TileConfig(block_m=64, block_n=16, num_warps=8, num_stages=2)


@functools.cache
def capability(device: torch.device) -> int:
    """10 * major + minor of a CUDA device; of a CPU, where kernels are interpreted, the smallest supported."""
    if device.type != "cuda":
        return min(SHARED_MEMORY)
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's CUDA device the current one, which is where Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
