"""The CUDA extension's product for few rows: each instance of its two kernels, as csrc launches them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...kernels.config import Config, arithmetic
from ...layer import error_budget, reference
from ...layer.extension import SMALL_CAPABILITIES
from ...layer.formats import WEIGHT_FORMATS, WeightFormat
from ..executor import cuda
from .case import SHORT, Case, Mismatch, case_of, equal, within_budget
from .inputs import activations, generator, stored, with_powers_of_two
from .products import BF16, FP16, FP32, QUICK_ARCHITECTURE

FAMILY = "extension"
DTYPES = (BF16, FP16, FP32)
BIASES = (None, BF16, FP16, FP32)
# (M, N, K): every M; N inside, at and past a tile's edge; K that ends inside a group, a half-block, a step and a word,
# and some that give every warp several steps.
SHAPES = (
    (1, 16, 128),
    (2, 40, 208),
    (3, 72, 144),
    (4, 33, 1040),
    (5, 9, 130),
    (6, 20, 136),
    (7, 33, 320),
    (8, 24, 240),
    (9, 32, 144),
    (10, 17, 176),
    (11, 1, 131),
    (12, 70, 1040),
    (13, 49, 133),
    (14, 31, 272),
    (15, 65, 656),
    (16, 40, 2240),
    (16, 7, 201),
)
QUICK_SHAPES = ((3, 72, 144), (16, 40, 2240), (16, 7, 201))
IDENTITY_INPUTS = {16: 320, 8: 160, 4: 160}  # by the rows at a time
CODES_SHAPES = ((4, 40, 656), (16, 33, 1040), (7, 24, 203))
QUICK_FORMATS = ("w8_g32", "w4_g128")


def small_product(
    fmt: WeightFormat,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
    silu: bool,
    kernel: str | None,
    arch: int,
):
    """Within the error budget; ``kernel``: None for the one that the extension takes."""
    rows, out_features, in_features = shape
    weight, bias = stored(fmt, out_features, in_features)
    bias = None if bias_dtype is None else bias.to(bias_dtype)
    x = activations(rows, in_features, dtype)
    y = cuda.small_product(x, weight, bias, silu, kernel)
    entering, error = error_budget.silu_operand(x) if silu else (x, None)
    w, does = reference.dequantize(weight), arithmetic(Config("cuda"), x.element_size())
    oracle = error_budget.product_oracle(entering, w, bias, dtype, does, arch, error)
    return within_budget(y, oracle, SHORT[dtype])


def whole_numbers(fmt: WeightFormat, shape: tuple[int, int, int], dtype: torch.dtype, bias_dtype: torch.dtype | None):
    """Small integers, with scales that are powers of two: every sum is exact, and the output's one rounding too."""
    rows, out_features, in_features = shape
    weight, _ = stored(fmt, out_features, in_features)
    weight = weight._replace(scale=torch.exp2(torch.randint(-1, 2, weight.scale.shape, generator=generator(5)).float()))
    x = torch.randint(-3, 4, (rows, in_features), generator=generator(6)).to(dtype)
    bias = torch.randint(-99, 100, (out_features,), generator=generator(7)).to(bias_dtype or FP32)
    exact = x.double() @ reference.dequantize(weight).double().T
    if bias_dtype is not None:
        exact = exact + bias.double()
    y = cuda.small_product(x, weight, None if bias_dtype is None else bias)
    return equal(y, exact.to(dtype), "sums")


def identity(fmt: WeightFormat, dtype: torch.dtype, rows: int):
    """One-hot rows, ``rows`` at a time: the product is the weight itself."""
    weight = with_powers_of_two(stored(fmt, 40, IDENTITY_INPUTS[rows])[0])
    eye = torch.eye(IDENTITY_INPUTS[rows], dtype=dtype)
    found = torch.cat([cuda.small_product(part, weight, None) for part in eye.split(rows)])
    return equal(found.float(), reference.dequantize(weight).T, "weight")


def anywhere(fmt: WeightFormat, dtype: torch.dtype, arch: int):
    """Rows of x, or the weight, that begin at odd places; rows whose vectors would reach past their end."""
    weight, bias = stored(fmt, 24, 160)
    does = arithmetic(Config("cuda"), dtype.itemsize)
    oracle_of = lambda x, w: error_budget.product_oracle(  # noqa: E731
        x, reference.dequantize(w), bias, dtype, does, arch
    )
    wide = activations(9, 176, dtype)
    for shift in (1, 4):
        x = wide[:, shift : shift + 160]
        _must_be_scalar(x, weight)
        within_budget(cuda.small_product(x, weight, bias), oracle_of(x, weight), f"x shifted by {shift}")
    raw = torch.empty(weight.qweight.numel() + 4, dtype=weight.qweight.dtype)
    shifted = weight._replace(qweight=raw[4:].view_as(weight.qweight).copy_(weight.qweight))
    x = wide[:, :160]
    _must_be_scalar(x, shifted)
    within_budget(cuda.small_product(x, shifted, bias), oracle_of(x, weight), "weight shifted")
    weight, bias = stored(fmt, 24, 149)
    x = wide[:, :149]
    _must_be_scalar(x, weight)
    return within_budget(cuda.small_product(x, weight, bias), oracle_of(x, weight), SHORT[dtype])


def _must_be_scalar(x, weight):
    if cuda.kernel_for(x, weight) != cuda.SCALAR:
        raise Mismatch("the matrix kernel would be launched")


def broken_row(fmt: WeightFormat, dtype: torch.dtype):
    """A row that is not finite stays alone."""
    weight, bias = stored(fmt, 24, 208)
    x = activations(9, 208, dtype)
    x[3, 7] = float("nan")
    broken = torch.isnan(cuda.small_product(x, weight, bias))
    if not broken[3].all() or broken[:3].any() or broken[4:].any():
        raise Mismatch("the broken row does not stay alone")
    return "alone"


def _of_format(fmt: WeightFormat, arch: int) -> Iterator[Case]:
    for place, dtype in enumerate(DTYPES):
        label = f"{fmt.name} x {SHORT[dtype]}"
        quick = fmt.name in QUICK_FORMATS and arch == QUICK_ARCHITECTURE
        for number, shape in enumerate(SHAPES):
            # By turns, so that each bias meets each dtype, with and without SiLU.
            bias, silu = BIASES[(number + place) % len(BIASES)], number // len(BIASES) % 2 == 1
            told = f"{', silu' if silu else ''}, {'no' if bias is None else SHORT[bias]} bias"
            arguments = fmt, shape, dtype, bias, silu
            fast = quick and shape in QUICK_SHAPES
            name = f"{label} {shape}{told}"
            yield case_of(FAMILY, name, small_product, *arguments, None, arch, quick=fast)
            if dtype != FP32 and shape[2] % 16 == 0 and number % 3 == place:
                yield case_of(FAMILY, f"{name}, scalar", small_product, *arguments, cuda.SCALAR, arch)
        for number, shape in enumerate(CODES_SHAPES):
            bias = BIASES[(number + place) % len(BIASES)]
            name = f"{label} {shape} whole numbers, {'no' if bias is None else SHORT[bias]} bias"
            yield case_of(FAMILY, name, whole_numbers, fmt, shape, dtype, bias, quick=quick and not number)
        for rows in IDENTITY_INPUTS if dtype != FP32 else (16,):  # each takes another instance of the matrix kernel
            quick_one = quick and rows == 16
            yield case_of(FAMILY, f"{label} identity, {rows} rows", identity, fmt, dtype, rows, quick=quick_one)
        yield case_of(FAMILY, f"{label} anywhere", anywhere, fmt, dtype, arch, quick=quick and dtype == BF16)
        yield case_of(FAMILY, f"{label} broken row", broken_row, fmt, dtype, quick=quick and dtype == BF16)


def cases(arch: int) -> Iterator[Case]:
    """Of all formats and dtypes; none where csrc cannot be compiled, or is not compiled for ``arch``."""
    if arch in SMALL_CAPABILITIES and cuda.why_unavailable() is None:
        for fmt in WEIGHT_FORMATS.values():
            yield from _of_format(fmt, arch)
