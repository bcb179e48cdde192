"""The CUDA extension: whether it is there, what it supports, and its two products with the reference's meaning.

``csrc/`` holds its sources and ``setup.py`` builds it. Importing this module loads nothing; :func:`load` does, once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from .formats import WeightFormat
from .packed_weight import PackedWeight

LIBRARY = Path(__file__).parent.parent / "_C.abi3.so"  # where setup.py leaves it
BUILD_IT = (
    "with nvcc on PATH, install torch and setuptools, then DITQ_BUILD_CUDA=1 pip install --no-build-isolation -e ."
)

SMALL_ROWS = 16
SMALL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Compute capabilities, as 10 * major + minor, that small_product is compiled for; as in setup.py.
SMALL_CAPABILITIES = (80, 86, 89, 90, 100, 120)
INT8_CAPABILITY = 90
INT8_DTYPES = (torch.bfloat16, torch.float16)
INT8_INPUTS = 16  # in_features must be a multiple of it,
INT8_OUTPUTS = 8  # and out_features of this one: rows of 16 bytes
H100_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Tile:
    """One instance of the int8 product.

    Attributes:
        rows, outputs: the part of the output that a thread block computes at a time.
        cluster: blocks, one above the other, that share the weights' tile.
        schedule: as csrc/int8_product.h explains it.
        start, step, wave: microseconds of an H200 (:func:`microseconds`), fitted to benchmarks/results/nvidia-h200/
            2026-11-27-int8.json by benchmarks/fit_costs.py.
    """

    rows: int
    outputs: int
    cluster: int
    schedule: Literal["ping_pong", "cooperative"]
    start: float
    step: float
    wave: float = 0.0


# As in csrc/int8_product.h, in its order; a tile's number is its place here.
TILES = (
    Tile(128, 256, 2, "cooperative", 1.90, 0.601, 3.35),
    Tile(128, 192, 2, "cooperative", 2.05, 0.460, 2.85),
    Tile(128, 160, 2, "cooperative", 2.44, 0.386, 2.41),
    Tile(128, 128, 2, "ping_pong", 3.94, 0.345),
    Tile(128, 96, 2, "ping_pong", 3.37, 0.299),
    Tile(64, 128, 4, "ping_pong", 2.45, 0.282),
    Tile(64, 96, 4, "ping_pong", 2.36, 0.247),
    Tile(64, 64, 2, "ping_pong", 2.99, 0.161),
)
STEP = 128  # inputs that are fetched at a time
# Clusters of four do not fill the groups in which an H100's 132 multiprocessors come (seen on an H200).
SHARE_OF_DEVICE = {1: 1.0, 2: 1.0, 4: 30 / 33}


@functools.cache
def _failure() -> str | None:
    """Loads the library and declares its fakes; what went wrong, or None."""
    if not LIBRARY.exists():
        return f"the CUDA extension is not built; {BUILD_IT}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the CUDA extension cannot be loaded ({error}); build it for this environment: {BUILD_IT}"
    if "Tensor(a!) y" not in str(torch.ops.ditq_cuda.int8_product.default._schema):
        return f"the CUDA extension was built from older sources; {BUILD_IT}"
    torch.library.register_fake("ditq_cuda::small_product", _small_product_fake)
    torch.library.register_fake("ditq_cuda::int8_product", _int8_product_fake)
    return None


def why_unavailable() -> str | None:
    """None if the extension can be used, else the reason in one clause, with the way out. Loads it if it is there."""
    return _failure()


def load() -> None:
    """Makes ``torch.ops.ditq_cuda`` usable. Calls after the first cost nothing.

    Raises:
        ImportError: if the extension is not built or cannot be loaded, with the way out.
    """
    reason = _failure()
    if reason:
        raise ImportError(reason)


def _small_product_fake(x, qweight, scale, group_code, bias, bits, group, silu):
    return x.new_empty((x.shape[0], qweight.shape[0]))


def _int8_product_fake(qx, sx, qweight, scale, bias, y, tile):
    return None


def _capability_text(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def _runs_small_product(capability: int) -> bool:
    """Machine code runs on its own major version from its minor on; the intermediate code of the last one on all
    later.
    """
    return capability >= SMALL_CAPABILITIES[-1] or any(
        capability // 10 == built // 10 and capability >= built for built in SMALL_CAPABILITIES
    )


def why_unsupported_a8(
    rows: int, out_features: int, in_features: int, fmt: WeightFormat, out_dtype: torch.dtype, capability: int
) -> str | None:
    """None if :func:`linear_a8` serves the problem, else the reason in one clause. ``capability``: 10 * major + minor
    of the device.
    """
    if capability != INT8_CAPABILITY:
        return (
            f"the extension's int8 product is built for compute capability {_capability_text(INT8_CAPABILITY)} only, "
            f"and this device has {_capability_text(capability)}"
        )
    if fmt.bits != 8 or fmt.group is not None:
        return f"the extension's int8 product takes int8 weights with one scale per output, and these are {fmt.name}"
    if out_dtype not in INT8_DTYPES:
        return f"the extension's int8 product writes {' or '.join(map(str, INT8_DTYPES))}, not {out_dtype}"
    if in_features % INT8_INPUTS or in_features == 0:
        return f"the extension's int8 product needs in_features to be a multiple of {INT8_INPUTS}, not {in_features}"
    if out_features % INT8_OUTPUTS:
        return f"the extension's int8 product needs out_features to be a multiple of {INT8_OUTPUTS}, not {out_features}"
    return None


def why_unsupported_a16(
    rows: int, out_features: int, in_features: int, fmt: WeightFormat, x_dtype: torch.dtype, capability: int
) -> str | None:
    """None if :func:`linear_a16` serves the problem, else the reason in one clause. ``capability``: 10 * major + minor
    of the device.
    """
    if not _runs_small_product(capability):
        return f"the extension is not built for compute capability {_capability_text(capability)}"
    if rows > SMALL_ROWS:
        return f"the extension's product for 16-bit activations takes at most {SMALL_ROWS} rows, not {rows}"
    if x_dtype not in SMALL_DTYPES:
        return f"the extension takes activations in {', '.join(map(str, SMALL_DTYPES))}, not {x_dtype}"
    if in_features == 0:
        return "the extension needs in_features to be at least 1"
    return None


def clusters_at_once(tile: Tile, multiprocessors: int) -> int:
    """How many thread blocks' clusters of the tile a device runs at the same time."""
    return max(int(multiprocessors // tile.cluster * SHARE_OF_DEVICE[tile.cluster]), 1)


def microseconds(tile: Tile, rows: int, out_features: int, in_features: int, multiprocessors: int) -> float:
    """Estimate of a product's duration on an H200: ``start`` once, ``wave`` for each round in which all
    multiprocessors are given a tile, and ``step`` for each STEP inputs of a round.
    """
    tiles = -(-rows // (tile.rows * tile.cluster)) * -(-out_features // tile.outputs)
    rounds = -(-tiles // clusters_at_once(tile, multiprocessors))
    return tile.start + rounds * (tile.wave + -(-in_features // STEP) * tile.step)


def choose_tile(rows: int, out_features: int, in_features: int, multiprocessors: int) -> int:
    """The number of the tile that is estimated to be the fastest."""
    shape = rows, out_features, in_features, multiprocessors
    return min(range(len(TILES)), key=lambda number: microseconds(TILES[number], *shape))


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def int8_product(
    qx: torch.Tensor,
    sx: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    tile: int | None = None,
) -> None:
    """Writes ``y`` [M, N], fp16 or bf16, whose rows may lie apart: ``qx`` int8 [M, K] times ``qweight`` int8 [N, K]
    transposed, ``acc * sx * scale + bias`` in fp32 and in this order. ``sx`` fp32 [M], ``scale`` fp32 [N], ``bias`` any
    float [N]. ``tile`` is a place in :data:`TILES`; None chooses one.

    Raises:
        ImportError: if the extension is not there.
        RuntimeError: if an operand or the device is not as :func:`why_unsupported_a8` wants it.
    """
    load()
    if tile is None:
        known = qx.device.type == "cuda" and torch.cuda.is_available()
        multiprocessors = _multiprocessors(qx.get_device()) if known else H100_MULTIPROCESSORS
        tile = choose_tile(qx.shape[0], qweight.shape[0], qx.shape[1], multiprocessors)
    torch.ops.ditq_cuda.int8_product(qx.contiguous(), sx, qweight, scale, bias, y, tile)


def linear_a8(
    qx: torch.Tensor,
    sx: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: int | None = None,
) -> torch.Tensor:
    """[M, N] in ``out_dtype`` of :func:`int8_product`.

    Raises:
        ImportError, RuntimeError: as that does.
        ValueError: if the format is not int8 with one scale per output.
    """
    if weight.fmt.bits != 8 or weight.fmt.group is not None:
        raise ValueError(why_unsupported_a8(0, 0, 0, weight.fmt, out_dtype, INT8_CAPABILITY))
    y = torch.empty((qx.shape[0], weight.out_features), dtype=out_dtype, device=qx.device)
    int8_product(qx, sx, weight.qweight, weight.scale, bias, y, tile)
    return y


def linear_a16(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    silu: bool = False,
) -> torch.Tensor:
    """``x`` [M, K], M up to 16, or SiLU of it rounded to its dtype, to [M, N] in ``x.dtype``. Rows of ``x`` may lie
    apart.

    Raises:
        ImportError: if the extension is not there.
        RuntimeError: if an operand is not as :func:`why_unsupported_a16` wants it.
    """
    load()
    rows = x if x.stride(1) == 1 else x.contiguous()
    qweight, scale, group_code, fmt, _ = weight
    return torch.ops.ditq_cuda.small_product(rows, qweight, scale, group_code, bias, fmt.bits, fmt.group or 0, silu)
