"""Activations to int8 codes and one fp32 scale per row, per token or by a calibrated reach, in one launch: as they
come, after GELU, or after LayerNorm and modulation.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..layer.errors import UnsupportedError
from .config import MAX_ACTIVATION_BLOCK
from .device import describe, launch_device
from .early_start import launch_options, starts_early, wait_for_earlier_kernels
from .launch import launch

# reference.SMALLEST_AMAX; a test holds the two together.
SMALLEST_AMAX = tl.constexpr(2.0**-100)
# Adding and subtracting 1.5 * 2**23 rounds a small fp32 number to an integer, ties to even, without a library call.
ROUNDING_OFFSET = tl.constexpr(12582912.0)
ONE_OVER_SQRT_2 = tl.constexpr(0.7071067811865476)
MINUS_TWO_SQRT_2_OVER_PI = tl.constexpr(-1.5957691216057308)
GELU_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _gelu(x, GELU: tl.constexpr):
    """fp32 GELU: "none" (PyTorch's name for the exact one), "tanh", or "" for the identity."""
    if GELU == "none":
        return 0.5 * x * (1.0 + tl.erf(x * ONE_OVER_SQRT_2))
    elif GELU == "tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2 u.
        return x / (1.0 + tl.exp((x + x * x * x * GELU_CUBIC) * MINUS_TWO_SQRT_2_OVER_PI))
    else:
        return x


@triton.jit
def _magnitude(value):
    """|value|, infinite where it is not finite: max() would drop NaN."""
    magnitude = tl.abs(value)
    return tl.where(magnitude < float("inf"), magnitude, float("inf"))


@triton.jit
def _reach(amax, largest):
    """The magnitude that code 127 stands for: the calibrated one, or the row's largest."""
    reach = largest if amax is None else tl.load(amax).to(tl.float32)
    return tl.maximum(reach, SMALLEST_AMAX)


@triton.jit
def _codes(value, factor, row_is_finite):
    # Clamped before rounding: the bounds are integers, so the order does not matter, and the offset trick needs small
    # numbers.
    scaled = tl.minimum(tl.maximum(value * factor, -127.0), 127.0)
    rounded = (scaled + ROUNDING_OFFSET) - ROUNDING_OFFSET
    return tl.where(row_is_finite, rounded, 0.0).to(tl.int8)


@triton.jit
def _store_scale(scales, row, reach, row_is_finite):
    tl.store(scales + row, tl.where(row_is_finite, tl.div_rn(reach, 127.0), float("nan")))


@triton.jit
def _load_row(x_row, k, K, stride_k, MASKED: tl.constexpr, GELU: tl.constexpr):
    place = x_row + k.to(tl.int64) * stride_k
    value = tl.load(place, mask=k < K, other=0) if MASKED else tl.load(place)
    return _gelu(value.to(tl.float32), GELU)


@triton.jit
def quantize_activation_kernel(
    x,
    amax,
    codes,
    scales,
    K,
    stride_m,
    stride_k,
    before,
    J,
    stride_before,
    GELU: tl.constexpr,
    BEFORE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    REST: tl.constexpr,
    ONE_PASS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program a row, which it keeps in registers if ``ONE_PASS``: BLOCK_K columns, all of them there, and the rest,
    of which there are up to REST. A longer row is read a second time, from the cache. In front of it stand J columns of
    ``before``, up to BEFORE, as they are.
    """
    if EARLY:
        wait_for_earlier_kernels()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    x_row = x + row * stride_m
    codes_row = codes + row * (K + J)
    if BEFORE:
        j = tl.arange(0, BEFORE)
        first = tl.load(before + row * stride_before + j, mask=j < J, other=0).to(tl.float32)
        largest_first = tl.max(_magnitude(first))
        codes_first = codes_row + j
        codes_row += J
    if ONE_PASS:
        value = _load_row(x_row, columns, K, stride_k, False, GELU)
        largest = tl.max(_magnitude(value))
        if REST:
            behind = BLOCK_K + tl.arange(0, REST)
            rest = _load_row(x_row, behind, K, stride_k, True, GELU)
            largest = tl.maximum(largest, tl.max(_magnitude(rest)))
        if BEFORE:
            largest = tl.maximum(largest, largest_first)
        row_is_finite = largest < float("inf")
        reach = _reach(amax, largest)
        factor = tl.div_rn(127.0, reach)
        tl.store(codes_row + columns, _codes(value, factor, row_is_finite))
        if REST:
            tl.store(codes_row + behind, _codes(rest, factor, row_is_finite), mask=behind < K)
    else:
        magnitude = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            value = _load_row(x_row, start + columns, K, stride_k, True, GELU)
            magnitude = tl.maximum(magnitude, _magnitude(value))
        largest = tl.max(magnitude)
        if BEFORE:
            largest = tl.maximum(largest, largest_first)
        row_is_finite = largest < float("inf")
        reach = _reach(amax, largest)
        factor = tl.div_rn(127.0, reach)
        for start in range(0, K, BLOCK_K):
            k = start + columns
            value = _load_row(x_row, k, K, stride_k, True, GELU)
            tl.store(codes_row + k, _codes(value, factor, row_is_finite), mask=k < K)
    if BEFORE:
        tl.store(codes_first, _codes(first, factor, row_is_finite), mask=j < J)
    _store_scale(scales, row, reach, row_is_finite)


@triton.jit
def _modulated(value, mean, deviation, k, K, weight, bias, shift, scale, MASKED: tl.constexpr):
    """``norm(value) * (1 + scale) + shift`` of columns ``k``; absent parts None."""
    inside = k < K if MASKED else None
    value = (value - mean) * deviation
    if weight is not None:
        value = value * tl.load(weight + k, mask=inside).to(tl.float32)
    if bias is not None:
        value = value + tl.load(bias + k, mask=inside).to(tl.float32)
    if scale is not None:
        value = value * (1.0 + tl.load(scale + k, mask=inside).to(tl.float32))
    if shift is not None:
        value = value + tl.load(shift + k, mask=inside).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["rows_per_batch"])
def norm_modulate_kernel(
    x,
    weight,
    bias,
    shift,
    scale,
    amax,
    y,
    y_scales,
    rows_per_batch,
    K,
    stride_batch,
    stride_m,
    stride_shift,
    stride_scale,
    eps,
    BLOCK_K: tl.constexpr,
    REST: tl.constexpr,
    EARLY: tl.constexpr,
):
    """LayerNorm and modulation of one row, ``norm(x) * (1 + scale) + shift``; quantized if ``y`` is int8. One program a
    row, kept in registers as in :func:`quantize_activation_kernel`.
    """
    if EARLY:
        wait_for_earlier_kernels()
    program = tl.program_id(0)
    batch = (program // rows_per_batch).to(tl.int64)
    inside_batch = (program % rows_per_batch).to(tl.int64)
    row = program.to(tl.int64)
    x_row = x + batch * stride_batch + inside_batch * stride_m
    if shift is not None:
        shift += batch * stride_shift
    if scale is not None:
        scale += batch * stride_scale
    k = tl.arange(0, BLOCK_K)
    value = tl.load(x_row + k).to(tl.float32)
    total = tl.sum(value)
    if REST:
        behind = BLOCK_K + tl.arange(0, REST)
        inside = behind < K
        rest = tl.load(x_row + behind, mask=inside, other=0).to(tl.float32)
        total += tl.sum(rest)
    mean = total / K
    squares = tl.sum((value - mean) * (value - mean))
    if REST:
        squares += tl.sum(tl.where(inside, (rest - mean) * (rest - mean), 0.0))
    deviation = tl.rsqrt(squares / K + eps)
    value = _modulated(value, mean, deviation, k, K, weight, bias, shift, scale, False)
    if REST:
        rest = _modulated(rest, mean, deviation, behind, K, weight, bias, shift, scale, True)
    y_row = y + row * K
    if y.dtype.element_ty == tl.int8:
        largest = tl.max(_magnitude(value))
        if REST:
            largest = tl.maximum(largest, tl.max(tl.where(inside, _magnitude(rest), 0.0)))
        row_is_finite = largest < float("inf")
        reach = _reach(amax, largest)
        factor = tl.div_rn(127.0, reach)
        tl.store(y_row + k, _codes(value, factor, row_is_finite))
        if REST:
            tl.store(y_row + behind, _codes(rest, factor, row_is_finite), mask=inside)
        _store_scale(y_scales, row, reach, row_is_finite)
    else:
        tl.store(y_row + k, value.to(y.dtype.element_ty))
        if REST:
            tl.store(y_row + behind, rest.to(y.dtype.element_ty), mask=inside)


@functools.cache
def specialise(
    columns: int, capability: int, gelu: str | None = None, before: int = 0
) -> tuple[dict[str, int | bool | str], dict[str, int | bool]]:
    """(compile-time constants, launch options) of a kernel over rows of ``columns``: of quantization behind ``gelu``
    and ``before`` columns, or, None, of modulation. Powers of two are what a program can hold: the largest in the row,
    and one for what is left of it, waste less than one for all.
    """
    whole = min(1 << max(columns.bit_length() - 1, 0), MAX_ACTIVATION_BLOCK)
    rest = triton.next_power_of_2(columns - whole) if whole < columns <= MAX_ACTIVATION_BLOCK else 0
    warps = whole // 1024 if whole > 4096 else max(min(whole // 1024, 2), 1)  # the fastest on an H200, or close to it
    early = starts_early(capability)
    # A fused multiply-add would round once where the definition rounds twice.
    options = dict(num_warps=warps, enable_fp_fusion=False) | launch_options(early)
    quantizes = {}
    if gelu is not None:
        first = triton.next_power_of_2(before) if before else 0
        quantizes = dict(GELU=gelu, BEFORE=first, ONE_PASS=0 < columns <= MAX_ACTIVATION_BLOCK)
    return dict(BLOCK_K=whole, REST=rest, EARLY=early) | quantizes, options


def _quantize(
    x: torch.Tensor, amax: torch.Tensor | None, gelu: str, before: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    first = 0 if before is None else before.shape[1]
    if first > MAX_ACTIVATION_BLOCK:
        raise UnsupportedError(
            f"the triton backend puts up to {MAX_ACTIVATION_BLOCK} columns before GELU's, got {first}; use the "
            "reference backend"
        )
    if first and before.stride(1) != 1:
        before = before.contiguous()
    codes = torch.empty((rows, first + columns), dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        constants, options = specialise(columns, describe(x.device).capability, gelu, first)
        with launch_device(x):
            launch(
                quantize_activation_kernel,
                (rows,),
                (
                    x,
                    amax,
                    codes,
                    scales,
                    columns,
                    x.stride(0),
                    x.stride(1),
                    before if first else None,
                    first,
                    before.stride(0) if first else 0,
                ),
                constants,
                options,
            )
    return codes, scales


def quantize_activation(x: torch.Tensor, amax: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ditq_kernels.layer.reference.quantize_activation`; any strides."""
    return _quantize(x, amax, "")


def gelu_quantize(
    x: torch.Tensor,
    amax: torch.Tensor | None = None,
    approximate: str = "none",
    before: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ditq_kernels.layer.reference.gelu_quantize`; any strides.

    Raises:
        UnsupportedError: for a ``before`` of more than ``config.MAX_ACTIVATION_BLOCK`` columns.
    """
    return _quantize(x, amax, approximate, before)


def _norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    amax: torch.Tensor | None,
    eps: float,
    y: torch.Tensor,
    y_scales: torch.Tensor | None,
) -> None:
    batches, rows, columns = x.shape
    if columns > MAX_ACTIVATION_BLOCK:
        raise UnsupportedError(
            f"norm_modulate on the triton backend takes up to {MAX_ACTIVATION_BLOCK} columns, got {columns}; "
            "use the reference backend"
        )
    if not (batches and rows and columns):
        return
    if x.stride(2) != 1 and columns > 1:
        x = x.contiguous()
    shift, scale = (part if part is None or part.stride(1) == 1 else part.contiguous() for part in (shift, scale))
    constants, options = specialise(columns, describe(x.device).capability)
    with launch_device(x):
        launch(
            norm_modulate_kernel,
            (rows * batches,),
            (
                x,
                weight,
                bias,
                shift,
                scale,
                amax,
                y,
                y_scales,
                rows,
                columns,
                x.stride(0),
                x.stride(1),
                0 if shift is None else shift.stride(0),
                0 if scale is None else scale.stride(0),
                eps,
            ),
            constants,
            options,
        )


def norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """See :func:`ditq_kernels.layer.reference.norm_modulate`.

    Raises:
        UnsupportedError: for rows of more than ``config.MAX_ACTIVATION_BLOCK`` columns.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _norm_modulate(x, weight, bias, shift, scale, None, eps, y, None)
    return y


def norm_modulate_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    amax: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`ditq_kernels.layer.reference.norm_modulate_quantize`.

    Raises:
        UnsupportedError: for rows of more than ``config.MAX_ACTIVATION_BLOCK`` columns.
    """
    rows = x.shape[0] * x.shape[1]
    codes = torch.empty((rows, x.shape[2]), dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if not x.shape[2]:
        return codes, scales.fill_(float("nan"))  # the mean of nothing
    _norm_modulate(x, weight, bias, shift, scale, amax, eps, codes, scales)
    return codes, scales
