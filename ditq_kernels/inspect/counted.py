"""What is counted of real layers' kernels: which products and quantizations, and what a count of a launch holds."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ..shapes import LAYERS

MODELS = ("DiT-XL/2 256px", "DiT-XL/2 512px", "PixArt-Sigma", "FLUX.1")
TOKENS, SAMPLES = ("w8", "w4_g128"), ("w4_g128",)  # formats of layers whose rows are tokens, and samples
TRITON, CUDA = "triton", "cuda"
MOST_SECTORS, MOST_PASSES = 1.1, 1.05  # of the least; what takes more is to be mended or explained


REGISTERS = 65536  # of a multiprocessor, given out to warps by 8 for each thread


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor holds at once."""

    blocks: int
    threads: int
    shared_bytes: int


# By architecture: CUDA C++ Programming Guide, table of technical specifications. A block takes 1 KB of shared memory
# more than it asks for.
RESIDENT = {
    80: Limits(32, 2048, 164 * 1024),
    89: Limits(24, 1536, 100 * 1024),
    90: Limits(32, 2048, 228 * 1024),
    120: Limits(24, 1536, 100 * 1024),
}


@dataclass(frozen=True)
class Subject:
    """What is counted: the product of one layer, or the quantization before it.

    Attributes:
        layers: that have this shape.
        rows, out_features, in_features: M, N and K; no N where activations are quantized.
        fmt: of the weight, "" where there is none.
        activations: "int8" or "bf16", as they enter the product.
        by: TRITON or CUDA, whose kernels these are: Triton's or the CUDA extension's.
    """

    layers: tuple[str, ...]
    rows: int
    out_features: int
    in_features: int
    fmt: str
    activations: str
    by: str = TRITON

    @property
    def name(self) -> str:
        if not self.fmt:
            return f"quantization {self.rows} x {self.in_features}"
        by = " csrc" if self.by == CUDA else ""
        return f"{self.fmt} x {self.activations} {self.rows} x {self.out_features} x {self.in_features}{by}"

    def is_for(self, arch: int) -> bool:
        """Whether there is such a kernel: the extension's int8 product is Hopper's."""
        return self.by == TRITON or self.activations != "int8" or arch == 90


@dataclass(frozen=True)
class Count:
    """Of one launch.

    Attributes:
        grid, warps: thread blocks, and warps of each.
        tiles: pieces of work: the thread blocks, or the tiles that persistent ones have among them.
        blocks: how many were executed.
        sectors, sectors_least: sectors of 32 bytes that requests for global memory touch, and the least they could, by
            kind and tensor, of the whole grid.
        fetched, tensors: bytes by tensor that cross between L2 and the multiprocessors
            (:attr:`.executor.counters.Counters.fetched`), and that the tensor has: what tiles read again is the one
            over the other.
        passes, passes_least: of shared memory, by kind, of the whole grid.
        engines: bytes of shared memory that wgmma and tensor copies read and write.
        macs: multiply-accumulates of matrix instructions, by the operands' type.
        issued: machine instructions by class (:mod:`.issued`), of an average warp and tile.
        registers: of a thread.
        shared_bytes: of a thread block.
        steps, stages: of a tile's loop, and how many of its steps' operands may be on their way or in use at once.
        ptx: PTX instructions by name, of a warp of the blocks that were executed.
        waits: by "what, groups left in flight", of a warp.
    """

    arch: int
    subject: Subject
    kernel: str
    grid: tuple[int, int, int]
    warps: int
    tiles: int
    blocks: int
    sectors: dict[str, int]
    sectors_least: dict[str, int]
    fetched: dict[str, int]
    tensors: dict[str, int]
    passes: dict[str, int]
    passes_least: dict[str, int]
    engines: int
    macs: dict[str, int]
    issued: dict[str, float]
    registers: int
    shared_bytes: int
    steps: int
    stages: int
    ptx: dict[str, float]
    waits: dict[str, float]

    @property
    def sector_ratio(self) -> float:
        """Sectors over the least number of them."""
        return _ratio(self.sectors, self.sectors_least)

    @property
    def pass_ratio(self) -> float:
        """Passes over the least number of them."""
        return _ratio(self.passes, self.passes_least)

    @property
    def blocks_in_grid(self) -> int:
        return math.prod(self.grid)

    @property
    def resident(self) -> int:
        """Thread blocks that a multiprocessor holds at once, by their threads, registers and shared memory."""
        limits = RESIDENT[self.arch]
        of_a_block = 32 * self.warps
        return max(
            1,
            min(
                limits.blocks,
                limits.threads // of_a_block,
                REGISTERS // (of_a_block * -(-max(1, self.registers) // 8) * 8),
                limits.shared_bytes // (self.shared_bytes + 1024),
            ),
        )

    @property
    def fetched_again(self) -> float:
        """Bytes that cross between L2 and the multiprocessors, over those that are touched."""
        return sum(self.fetched.values()) / self.touched

    @property
    def touched(self) -> int:
        """Bytes of the tensors that the launch reads or writes; of some it has a part to itself."""
        return sum(min(size, self.fetched[name]) for name, size in self.tensors.items())

    def over(self) -> list[str]:
        """What takes more than :data:`MOST_SECTORS` or :data:`MOST_PASSES` of the least, each with its ratio and its
        share of all sectors or passes.
        """
        parts = ((self.sectors, self.sectors_least, MOST_SECTORS), (self.passes, self.passes_least, MOST_PASSES))
        return [
            f"{name} {taken[name] / least:.2f} ({taken[name] / sum(taken.values()):.0%})"
            for taken, all_least, most in parts
            for name, least in all_least.items()
            if taken[name] > most * least
        ]


def _ratio(taken, least):
    return sum(taken.values()) / sum(least.values()) if least else 1.0


@functools.cache
def subjects() -> tuple[Subject, ...]:
    """Products and quantizations of the layers of :data:`MODELS`, each shape once."""
    of_shape: dict[tuple, list[str]] = {}
    for layer in LAYERS:
        if layer.model not in MODELS:
            continue
        entering, formats = ("bf16", SAMPLES) if layer.modulation else ("int8", TOKENS)
        for rows in layer.rows:
            name = f"{layer.model} {layer.role}"
            shape = rows, layer.out_features, layer.in_features
            for fmt in formats:
                of_shape.setdefault((*shape, fmt, entering), []).append(name)
            # The extension multiplies int8 weights; what is decoded before them is Triton's, and counted there.
            of_shape.setdefault((*shape, formats[0], entering, CUDA), []).append(name)
            if not layer.modulation:
                names = of_shape.setdefault((rows, 0, layer.in_features, "", "bf16"), [])
                names += [name] if name not in names else []
    return tuple(Subject(tuple(names), *shape) for shape, names in of_shape.items())


@dataclass(frozen=True)
class Loop:
    """Of a product: what a tile has and how it is walked through.

    Attributes:
        rows, outputs: of a tile; ``step``: inputs that are fetched at a time.
        stages: steps whose operands have a place.
        persistent: whether a thread block takes one tile after the other.
    """

    rows: int
    outputs: int
    step: int
    stages: int
    persistent: bool


def chosen(match: str = "") -> list[Subject]:
    """The subjects whose name or layers hold ``match``."""
    return [one for one in subjects() if match in one.name or any(match in layer for layer in one.layers)]
