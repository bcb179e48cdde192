"""The order in which tiles of the output are computed."""

from __future__ import annotations

import triton
import triton.language as tl

TILES_PER_GROUP = 8  # tiles of M that share one column of weight tiles before the next is begun


@triton.jit
def tile_position(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEIGHT: tl.constexpr = TILES_PER_GROUP):
    """(row, output) at which tile number ``tile`` begins. Tiles that run at the same time form a compact patch, so that
    they find each other's operands in the L2 cache.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = (tile // (HEIGHT * tiles_n)) * HEIGHT
    height = tl.minimum(tiles_m - first, HEIGHT)
    inside = tile % (HEIGHT * tiles_n)
    return (first + inside % height) * BLOCK_M, (inside // height) * BLOCK_N
