"""What products take on Hopper, in microseconds: formulas whose constants were fitted to timings of an H200
(benchmarks/fit_costs.py; benchmarks/results/nvidia-h200/2026-11-27-*.json). An H100 has the same multiprocessors and
less bandwidth; which of two kernels is the faster is taken to be the same there.
"""

from __future__ import annotations

from typing import NamedTuple

from ..layer import extension


class Cost(NamedTuple):
    """Of a kernel with one thread block a tile: ``start`` once, and ``step`` for every STEP inputs of each tile that a
    multiprocessor computes, of which it takes ``alone`` at least: what waits in one block, another one hides.
    """

    start: float
    step: float
    alone: float


Form = tuple[int, int, int, int, bool]  # block_m, block_n, num_warps, num_stages, descriptors
STEP = 128

DENSE_INT8: dict[Form, Cost] = {
    (128, 256, 8, 3, True): Cost(5.38, 0.852, 1),
    (128, 128, 8, 3, True): Cost(4.74, 0.626, 1),
    (128, 128, 8, 2, True): Cost(4.87, 1.122, 1),
    (64, 128, 4, 4, True): Cost(3.94, 0.373, 1),
    (64, 128, 4, 3, True): Cost(4.07, 0.467, 1),
    (64, 64, 4, 4, True): Cost(4.20, 0.319, 1),
    (128, 256, 8, 3, False): Cost(5.28, 0.964, 1),
    (128, 128, 8, 3, False): Cost(4.69, 0.656, 1),
    (128, 128, 8, 2, False): Cost(5.08, 1.141, 1),
    (64, 128, 4, 4, False): Cost(4.43, 0.257, 1.25),
    (64, 128, 4, 3, False): Cost(4.22, 0.257, 1.75),
    (64, 64, 4, 4, False): Cost(3.43, 0.174, 1.75),
}
# Decoded in the loop, by the weights' bits and the activations' bytes. Timed with w8 and w4_g128; 8-bit weights with
# 16-bit activations are taken to be like 4-bit ones, and other groups like these.
_FOUR_BITS_16 = {
    (128, 128, 8, 3, False): Cost(4.27, 1.485, 1),
    (128, 128, 8, 2, False): Cost(4.66, 1.739, 1),
    (64, 128, 4, 3, False): Cost(4.04, 0.752, 1.75),
    (64, 128, 8, 2, False): Cost(4.18, 0.770, 1.75),
    (64, 64, 4, 4, False): Cost(3.89, 0.508, 1.75),
    (32, 64, 4, 4, False): Cost(3.57, 0.238, 3.5),
    (16, 64, 4, 4, False): Cost(3.49, 0.202, 4),
}
IN_LOOP: dict[tuple[int, int], dict[Form, Cost]] = {
    (8, 1): {
        (128, 128, 8, 3, False): Cost(4.69, 0.520, 1.25),
        (128, 128, 8, 2, False): Cost(4.68, 0.747, 1.75),
        (64, 128, 4, 3, False): Cost(3.58, 0.357, 1.5),
        (64, 128, 8, 2, False): Cost(4.15, 0.399, 2.5),
        (64, 64, 4, 4, False): Cost(3.26, 0.246, 1.25),
        (32, 64, 4, 4, False): Cost(3.06, 0.179, 1.5),
        (16, 64, 4, 4, False): Cost(3.20, 0.153, 1),
    },
    (4, 1): {
        (128, 128, 8, 3, False): Cost(4.07, 0.674, 1.75),
        (128, 128, 8, 2, False): Cost(4.40, 0.794, 1.75),
        (64, 128, 4, 3, False): Cost(4.65, 0.391, 2.5),
        (64, 128, 8, 2, False): Cost(4.58, 0.440, 2.5),
        (64, 64, 4, 4, False): Cost(3.30, 0.218, 4),
        (32, 64, 4, 4, False): Cost(4.06, 0.143, 5),
        (16, 64, 4, 4, False): Cost(4.80, 0.125, 5),
    },
    (4, 2): _FOUR_BITS_16,
    (8, 2): _FOUR_BITS_16,
}
# (once, for a million weights) of decoding into a scratch, by its elements' bytes; fp32 was not timed.
EXPANSION = {1: (1.6, 0.28), 2: (1.9, 0.35), 4: (1.9, 0.7)}
# Our own dense product of 16 bits beside cuBLAS': it was the slower one wherever the scratch held the whole weight.
DENSE_16_TO_CUBLAS = 1.15


def tiled(cost: Cost, form: Form, rows: int, out_features: int, in_features: int, multiprocessors: int) -> float:
    """Of one tile a thread block."""
    tiles = -(-rows // form[0]) * -(-out_features // form[1])
    return cost.start + cost.step * -(-in_features // STEP) * max(cost.alone, -(-tiles // multiprocessors))


def cublas(rows: int, out_features: int, in_features: int) -> float:
    """Of a bf16 product."""
    return 3.95 + 2.52e-9 * rows * out_features * in_features + 0.104 * -(-in_features // STEP)


def expansion(out_features: int, in_features: int, element_bytes: int) -> float:
    """Of decoding a weight into a scratch."""
    once, million = EXPANSION[element_bytes]
    return once + million * out_features * in_features / 1e6


ADDING = (2.0, 3350.0)  # once, and bytes in a nanosecond, of a pass that adds a residual: reasoned, not timed


def adding(rows: int, out_features: int) -> float:
    """Of a pass that adds a 16-bit product to a residual: both are read, and one is written."""
    once, rate = ADDING
    return once + 3 * 2 * rows * out_features / rate / 1e3


def extension_product(instance: int, rows: int, out_features: int, in_features: int, multiprocessors: int) -> float:
    """Of the CUDA extension's int8 product."""
    return extension.microseconds(extension.TILES[instance], rows, out_features, in_features, multiprocessors)
