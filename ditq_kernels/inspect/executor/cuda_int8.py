"""The CUDA extension's int8 product for Hopper, executed as csrc/int8_product.cu launches it."""

from __future__ import annotations

import struct

import numpy as np
import torch

from ...layer.extension import TILES, Tile
from . import driver
from .copies import TensorMap
from .cuda import FLOAT_TYPES, kernels
from .global_memory import Region

ARCHITECTURE = 90
SOURCE = "int8_product.cu"
STEP = 128  # inputs of a box; this and the constants below as in csrc/int8_product.cuh
SWIZZLE_128_BYTES = 3
THREADS = 384
SHARED_BYTES = 227 * 1024
_BARRIER_BYTES = 256
_MANGLED = {torch.float16: "6__half", torch.bfloat16: "13__nv_bfloat16"}
# struct Int8Output, csrc/int8_product.cuh: four pointers, an int64, four int.
_INT8_OUTPUT = struct.Struct("<4Qq4i")


def text_of(tile: int, out_dtype: torch.dtype) -> str:
    """PTX of the kernel for a place in :data:`TILES`."""
    mangled = f"19int8_product_kernelINS_8Int8TileILi{tile}EEE{_MANGLED[out_dtype]}E"
    (text,) = [text for entry, text in kernels(SOURCE, "90a").items() if mangled in entry]
    return text


def shared_bytes(tile: Tile) -> int:
    """``Plan::shared_bytes``."""
    stage, others = (tile.rows + tile.outputs) * STEP, 2 * 2 * tile.outputs * 4 + _BARRIER_BYTES
    return min((SHARED_BYTES - others) // stage, _BARRIER_BYTES // 16) * stage + others


def stages(tile: Tile) -> int:
    """Steps whose operands a thread block holds at once: all else in its shared memory is less than one's."""
    return shared_bytes(tile) // ((tile.rows + tile.outputs) * STEP)


def _map(name: str, matrix: torch.Tensor, box_rows: int) -> tuple[Region, TensorMap]:
    region = Region(name, matrix)
    rows, inputs = matrix.shape
    elements = region.views[1][region.first - region.start :]
    seen = np.lib.stride_tricks.as_strided(elements, (rows, inputs), (inputs, 1), writeable=False)
    return region, TensorMap(region, seen.view(np.uint8), (box_rows, STEP), SWIZZLE_128_BYTES)


def int8_product(
    qx: torch.Tensor,
    sx: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: int,
    clusters: int,
) -> torch.Tensor:
    """``ditq_cuda::int8_product`` by the driver that is installed: [M, N] in ``out_dtype``, fp16 or bf16.

    Args:
        qx: int8 [M, K]. sx: fp32 [M]. qweight: int8 [N, K]. scale: fp32 [N]. bias: [N] of any float type, or None.
        tile: a place in :data:`TILES`.
        clusters: that a device runs at once; each takes one tile after another.

    Raises:
        Fault: for what a GPU would fault on. Unsupported: for an instruction that is not implemented.
    """
    session = driver.installed()
    shape = TILES[tile]
    (rows, inputs), outputs = qx.shape, len(qweight)
    y = torch.full((rows, outputs), float("nan"), dtype=out_dtype)
    x_region, x_map = _map("qx", qx, shape.rows)
    w_region, w_map = _map("qweight", qweight, shape.outputs // shape.cluster)
    tensors = dict(sx=sx, scale=scale, bias=bias, y=y)
    regions = {key: Region(key, tensor) for key, tensor in tensors.items() if tensor is not None}
    fields = _INT8_OUTPUT.pack(
        *(regions[key].first if key in regions else 0 for key in tensors),
        outputs,
        0 if bias is None else FLOAT_TYPES[bias.dtype],
        rows,
        outputs,
        inputs,
    )
    tiles = -(-rows // (shape.rows * shape.cluster)) * -(-outputs // shape.outputs)
    driver.run(
        session,
        text_of(tile, out_dtype),
        (min(tiles, clusters) * shape.cluster, 1, 1),
        [x_region, w_region, *regions.values()],
        [x_map, w_map, np.frombuffer(fields, np.uint8)],
        shared=shared_bytes(shape),
        threads=THREADS,
        cluster=shape.cluster,
    )
    return y
