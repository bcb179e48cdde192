"""The CUDA extension's int8 product for Hopper: every tile, as csrc launches it, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...layer import reference
from ...layer.extension import INT8_CAPABILITY, INT8_DTYPES, TILES, Tile
from ...layer.formats import WEIGHT_FORMATS
from ..executor import cuda, cuda_int8
from .case import SHORT, Case, Mismatch, case_of, equal
from .extension import BIASES, FAMILY
from .inputs import generator, stored
from .products import BF16, FP16

BAND = 8  # rows of tiles that are computed together, csrc/int8_product.cuh
COOPERATIVE, PING_PONG, OF_FOUR = 2, 7, 6  # tiles, one of each kind
KINDS = (COOPERATIVE, PING_PONG, OF_FOUR)


def shapes(tile: Tile) -> dict[str, tuple[tuple[int, int, int], int]]:
    """(M, N, K) and the clusters that run at once, by a name.

    long: two tiles one after the other, of more steps than there are stages. wide: four tiles, so that each of a
    ping-pong's warpgroups has two; in the last ones, all blocks of a cluster but the first have no rows. many: more
    tiles than a band has, each of less than a step.
    """
    rows, fitting = tile.rows * tile.cluster, cuda_int8.stages(tile)
    return {
        "long": ((rows - 3, tile.outputs + 24, 128 * fitting + 16), 1),
        "wide": ((rows + 5, tile.outputs + 8, 128 * (fitting // 2) + 48), 1),
        "many": ((BAND * tile.rows + 70, tile.outputs + 16, 80), 2),
    }


def _operands(shape: tuple[int, int, int]):
    """(codes, scales of the rows, weight, bias): every code there is."""
    rows, out_features, in_features = shape
    weight, bias = stored(WEIGHT_FORMATS["w8"], out_features, in_features)
    qx = torch.randint(-128, 128, (rows, in_features), generator=generator(8)).to(torch.int8)
    return qx, 0.01 * torch.rand(rows, generator=generator(9)), weight, bias


def _judged(qx, sx, weight, bias, dtype, tile, clusters) -> str:
    y = cuda_int8.int8_product(qx, sx, weight.qweight, weight.scale, bias, dtype, tile, clusters)
    expected = reference.linear_a8(qx, sx, weight, bias, dtype)
    equal(y, expected, "outputs")
    known = ~expected.isnan()
    return equal(y[known].view(torch.int16), expected[known].view(torch.int16), "bits of the outputs")


def product(tile: int, shape: tuple[int, int, int], clusters: int, dtype: torch.dtype, bias_dtype: torch.dtype | None):
    """Bit for bit the reference's."""
    qx, sx, weight, bias = _operands(shape)
    return _judged(qx, sx, weight, None if bias_dtype is None else bias.to(bias_dtype), dtype, tile, clusters)


def largest_codes(tile: int, dtype: torch.dtype):
    """Rows and outputs of the largest codes: sums beyond 2 ** 24, which fp32 must round."""
    (rows, out_features, in_features), clusters = shapes(TILES[tile])["long"]
    shape = rows, out_features, max(in_features, 1168)
    qx, sx, weight, _ = _operands(shape)
    qx[::2], qx[1::4] = 127, -128
    codes = weight.qweight.clone()
    codes[::3], codes[1::3] = 127, -127
    codes[:, ::7] -= codes[:, ::7].sign()
    return _judged(qx, 0.01 * sx, weight._replace(qweight=codes), None, dtype, tile, clusters)


def broken_row(tile: int, dtype: torch.dtype):
    """A row whose scale is NaN stays alone."""
    (_, out_features, in_features), clusters = shapes(TILES[tile])["wide"]
    qx, sx, weight, bias = _operands((TILES[tile].rows + 9, out_features, in_features))
    sx[3] = float("nan")
    y = cuda_int8.int8_product(qx, sx, weight.qweight, weight.scale, bias, dtype, tile, clusters)
    broken = y.isnan()
    if not broken[3].all() or broken[:3].any() or broken[4:].any():
        raise Mismatch("the broken row does not stay alone")
    others = torch.arange(len(qx)) != 3
    return equal(y[others], reference.linear_a8(qx[others], sx[others], weight, bias, dtype), "other rows")


def cases(arch: int) -> Iterator[Case]:
    """Of all tiles; none where csrc cannot be compiled, or the product is not compiled for ``arch``."""
    if arch != INT8_CAPABILITY or cuda.why_unavailable() is not None:
        return
    for number, tile in enumerate(TILES):
        label = f"int8 tile {number} ({tile.rows}x{tile.outputs}, {tile.cluster} blocks, {tile.schedule})"
        for place, (name, (shape, clusters)) in enumerate(shapes(tile).items()):
            dtype = (BF16, FP16, INT8_DTYPES[number % 2])[place]
            bias = BIASES[(number + place) % len(BIASES)]
            told = f"{label} x {SHORT[dtype]} {name} {shape}, {'no' if bias is None else SHORT[bias]} bias"
            quick = name == "wide" and number in KINDS
            yield case_of(FAMILY, told, product, number, shape, clusters, dtype, bias, quick=quick)
        if number in KINDS:
            dtype = INT8_DTYPES[number % 2]
            yield case_of(FAMILY, f"{label} x {SHORT[dtype]} largest codes", largest_codes, number, dtype)
            yield case_of(FAMILY, f"{label} x {SHORT[dtype]} broken row", broken_row, number, dtype)
