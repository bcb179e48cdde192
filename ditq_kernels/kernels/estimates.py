"""The heuristic: the valid configuration of a product that is estimated to take the least time.

The constants are reasoned and not measured, but for Hopper's (:mod:`.hopper_costs`). A table of measured winners
(:mod:`.tables`) goes before it.
"""

from __future__ import annotations

import math

from . import hopper_costs
from .config import (
    EXTENSION_ROUTES,
    OVERLAPPED_ROUTES,
    WARPGROUP_FAMILIES,
    Config,
    Problem,
    adds_residuals,
    candidates,
    cdiv,
    family,
)

# Up to here it pays to multiply without matrix instructions. Each row more takes instructions for each weight: of four
# rows the schedulers set the bound, at more than twice that of the loop with matrix instructions (counted, sm_80 and
# sm_90), and on an H200 the loop took less for sixteen rows than this for four, by 1.05 to 1.8.
FEWEST_ROWS = 2
# The heuristic's constants where nothing was timed: on all but Hopper. What was counted says so.
# A tile of b_m x b_n costs b_m * b_n * (1 + EDGE_COST * (1 / b_m + 1 / b_n)): operands beside products.
EDGE_COST = 32.0
DECODE_COST = {1: 0.12, 2: 0.5}  # share that decoding in the loop adds, by the activations' bytes
# Of int8 weights that the loop could as well read as a dense product does: on sm_80 the same tile then takes 1.36 times
# the passes of shared memory (counted). It decides between equal tiles, and no more.
LOOP_COST = 1.01
EXPANSION_ROWS = 245.0  # decoding into the scratch costs as much as this many rows of the product
POINTER_COST = 1.05  # of pointers where the copy engine is at hand
# cuBLAS has tiles of many shapes and picks one itself; its kernels are taken to be this much faster than ours.
CUBLAS_TILES = ((128, 256), (128, 128), (64, 128), (64, 64))
CUBLAS_COST = 0.9


def _tiled_cost(block_m: int, block_n: int, problem: Problem) -> float:
    """Waves of tiles over the multiprocessors, times what a tile costs."""
    tiles = cdiv(problem.rows, block_m) * cdiv(problem.out_features, block_n)
    return cdiv(tiles, problem.multiprocessors) * block_m * block_n * (1 + EDGE_COST * (1 / block_m + 1 / block_n))


def _assumed(config: Config, problem: Problem) -> float:
    """The figure for a duration where nothing was timed: of no unit, comparable among one problem's configurations."""
    if config.block_m:
        cost = _tiled_cost(config.block_m, config.block_n, problem)
        if family(problem.capability) in WARPGROUP_FAMILIES and not config.descriptors:
            cost *= POINTER_COST
    else:
        cost = CUBLAS_COST * min(_tiled_cost(*tile, problem) for tile in CUBLAS_TILES)
    if config.route == "expanded":
        cost += EXPANSION_ROWS * problem.out_features / problem.multiprocessors
    elif config.route == "in_loop":
        decodes = problem.fmt.bits == 4 or problem.activation_bytes > 1
        cost *= 1 + DECODE_COST[problem.activation_bytes] if decodes else LOOP_COST
    return cost - 1e-3 * config.num_stages  # deeper pipelines first


def _adding(config: Config, problem: Problem) -> float:
    """Microseconds on Hopper of the pass that adds a product to its residual. Elsewhere there is none to choose."""
    passes = problem.adds and not adds_residuals(config) and family(problem.capability) == 9
    return hopper_costs.adding(problem.rows, problem.out_features) if passes else 0.0


def _on_hopper(config: Config, problem: Problem) -> float:
    """Microseconds, from what was timed."""
    shape = problem.rows, problem.out_features, problem.in_features
    form = config.block_m, config.block_n, config.num_warps, config.num_stages, config.descriptors
    if config.route == "in_loop":
        costs = hopper_costs.IN_LOOP[problem.fmt.bits, problem.activation_bytes]
        return hopper_costs.tiled(costs[form], form, *shape, problem.multiprocessors)
    if config.route in EXTENSION_ROUTES:
        cost = hopper_costs.extension_product(config.instance, *shape, problem.multiprocessors)
    elif problem.activation_bytes == 1:
        cost = hopper_costs.tiled(hopper_costs.DENSE_INT8[form], form, *shape, problem.multiprocessors)
    else:
        cost = hopper_costs.cublas(*shape) * (hopper_costs.DENSE_16_TO_CUBLAS if config.block_m else 1.0)
    if config.route.startswith("expanded"):
        cost += hopper_costs.expansion(problem.out_features, problem.in_features, problem.activation_bytes)
    return cost


UNTIMED = 1e6  # times what is reasoned: behind all that was timed


def estimate(config: Config, problem: Problem) -> float:
    """The heuristic's figure for the duration, comparable among the configurations of one problem; in microseconds on
    Hopper.
    """
    # The extension's product of few rows was the faster one wherever both ran.
    if config.route == "cuda" and problem.activation_bytes > 1:
        return -1.0
    if config.route == "small":  # nothing reads the weights of one row faster
        return 0.0 if problem.rows <= FEWEST_ROWS or problem.activation_bytes > 2 else math.inf
    if config.route in OVERLAPPED_ROUTES:  # chosen where a table of this GPU has them
        return UNTIMED * _tiled_cost(config.block_m, config.block_n, problem)
    cost = (_on_hopper if family(problem.capability) == 9 else _assumed)(config, problem)
    return cost + _adding(config, problem)


def heuristic(problem: Problem, extension: bool = True) -> Config:
    """The valid configuration with the smallest :func:`estimate`; the first listed among equals.

    Args:
        extension: whether the CUDA extension may be chosen. It is where it was timed: on Hopper.
    """
    extension = extension and family(problem.capability) == 9
    possible = (config for config in candidates(problem) if extension or config.route not in EXTENSION_ROUTES)
    return min(possible, key=lambda config: estimate(config, problem))
