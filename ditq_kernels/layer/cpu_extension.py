"""The extension for CPUs: what PyTorch would take many passes over memory for, in one.

``csrc/cpu`` holds its sources and ``setup.py`` builds it where there is a C++ compiler. Importing this module loads
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .formats import CODE4_MAX, WeightFormat, largest_multiplier
from .gated_residual import GatedResidual
from .packed_weight import PackedWeight

LIBRARY = Path(__file__).parent.parent / "_cpu.abi3.so"  # where setup.py leaves it
BUILD_IT = "with g++ on PATH, install torch and setuptools, then DITQ_BUILD_CPU=1 pip install --no-build-isolation -e ."
WEIGHT_DTYPES = (torch.float32, torch.bfloat16)
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_LANES = 16  # values that csrc computes with at once
FEW_ROWS = 16  # whose product is bound by reading weights
LARGEST_OF_FEW_ROWS = 1e30  # activations whose sums with integers, before they are scaled, fp32 holds
OUTPUT_DTYPES = (*ACTIVATION_DTYPES, torch.int32)
# Levels of instructions, as csrc/cpu/levels.cpp lists them: for rounding weights, and for activations and products.
WEIGHT_LEVELS = ("baseline", "avx2", "avx512")
PRODUCT_LEVELS = ("avx2", "avx512_vnni", "amx")


@functools.cache
def why_unavailable() -> str | None:
    """None if the extension can be used, else the reason in one clause, with the way out. Loads it if it is there."""
    if not LIBRARY.exists():
        return f"the CPU extension is not built; {BUILD_IT}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"the CPU extension cannot be loaded ({error}); build it for this environment: {BUILD_IT}"
    multiply = getattr(torch.ops.ditq_cpu, "linear_a8", None)
    if multiply is None or "Tensor? residual" not in str(multiply.default._schema):
        return f"the CPU extension was built from older sources; {BUILD_IT}"
    return None


def weight_levels() -> tuple[str, ...]:
    """Those of :data:`WEIGHT_LEVELS` that this CPU runs; the last is taken."""
    return WEIGHT_LEVELS[: torch.ops.ditq_cpu.weight_level_count()]


def product_levels() -> tuple[str, ...]:
    """Those of :data:`PRODUCT_LEVELS` that this CPU runs; the last is taken."""
    return PRODUCT_LEVELS[: torch.ops.ditq_cpu.product_level_count()]


@functools.cache
def why_no_products() -> str | None:
    """None if the extension multiplies on this CPU, else the reason in one clause."""
    return why_unavailable() or (None if product_levels() else f"this CPU has no {PRODUCT_LEVELS[0]} instructions")


def rounds(weight: torch.Tensor) -> bool:
    """Whether :func:`quantize_weight` takes ``weight``."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in WEIGHT_DTYPES
        and weight.stride(1) == 1
        and weight.numel() > 0
        and why_unavailable() is None
    )


_LIMITS = tuple(float(largest_multiplier(zero_point)) for zero_point in range(CODE4_MAX + 1))


def quantize_weight(
    weight: torch.Tensor,
    fmt: WeightFormat,
    rules: Sequence[int],
    ratios: Sequence[float],
    level: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """``weight`` [N, K] to nearest.

    Args:
        rules: numbers of csrc's RangeRule, tried in turn with each of ``ratios``, by which ranges are shrunk.
        level: one of :func:`weight_levels`; None: the last.

    Returns:
        codes, scale, multiplier and zero point as in :class:`.quantizer.QuantizedWeight`; and for each row whether
        candidates were so close that the order of a sum decides, and whether it holds a value that is not finite.
    """
    rows, inputs = weight.shape
    group = fmt.group or inputs
    groups = -(-inputs // group)
    scale_shape = (groups, rows) if fmt.promoted else (rows,)
    # Callers may have set another default dtype or device.
    empty, fp32 = functools.partial(torch.empty, device="cpu"), dict(dtype=torch.float32, device="cpu")
    codes = empty(rows, inputs, dtype=torch.uint8 if fmt.two_level else torch.int8)
    scale = empty(scale_shape, dtype=torch.float32)
    multiplier, zero_point = (empty(groups, rows, dtype=torch.uint8) if fmt.two_level else None for _ in range(2))
    doubtful, broken = (empty(rows, dtype=torch.bool) for _ in range(2))
    torch.ops.ditq_cpu.quantize_weight(
        weight,
        group,
        torch.tensor(rules, dtype=torch.int32, device="cpu"),
        torch.tensor(ratios, **fp32),
        torch.tensor(_LIMITS, **fp32) if fmt.two_level else None,
        codes,
        scale,
        multiplier,
        zero_point,
        doubtful,
        broken,
        -1 if level is None else weight_levels().index(level),
    )
    return codes, scale, multiplier, zero_point, doubtful, broken


def compensate(
    exact: torch.Tensor,
    wanted: torch.Tensor,
    within: torch.Tensor,
    step: torch.Tensor,
    zero: torch.Tensor,
    limits: tuple[int, int],
    errors: torch.Tensor,
    codes: torch.Tensor,
    level: str | None = None,
) -> None:
    """Fills ``errors`` and ``codes`` as :mod:`.compensation` does, up to the order of sums, by one of
    :func:`weight_levels`.

    Raises:
        TypeError: unless all are fp32 and contiguous, as they are read.
    """
    for part in (exact, wanted, within, step, zero, errors, codes):
        if part.dtype != torch.float32 or not part.is_contiguous():
            raise TypeError(f"a block to compensate must be torch.float32 and contiguous, got {part.dtype}")
    number = -1 if level is None else weight_levels().index(level)
    torch.ops.ditq_cpu.compensate(exact, wanted, within, step, zero, *limits, errors, codes, number)


def quantize_activation(
    x: torch.Tensor, amax: torch.Tensor | None, level: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`.reference.quantize_activation` of ``x`` [M, K] that is not empty, by one of :func:`product_levels`."""
    return torch.ops.ditq_cpu.quantize_activation(_rows(x), amax, _product_number(level))


def gelu_quantize(
    x: torch.Tensor, amax: torch.Tensor | None, level: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`.reference.gelu_quantize` with tanh, of ``x`` [M, K] that is not empty, up to the rounding of
    exponentials.
    """
    return torch.ops.ditq_cpu.gelu_quantize(_rows(x), amax, _product_number(level))


def norm_modulate_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    amax: torch.Tensor | None,
    eps: float,
    level: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`.reference.norm_modulate_quantize` of ``x`` [B, T, K] that is not empty, up to the order of sums."""
    gain = None if scale is None else _padded(scale) + 1
    parts = *map(_padded, (weight, bias)), gain, _padded(shift)
    rows = _rows(x.flatten(0, 1))
    return torch.ops.ditq_cpu.norm_quantize(rows, *parts, amax, x.shape[1], eps, _product_number(level))


def linear_a8(
    qx: torch.Tensor,
    sx: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    added: GatedResidual | None = None,
    level: str | None = None,
) -> torch.Tensor:
    """:func:`.reference.linear_a8` of what is not empty, to one of :data:`OUTPUT_DTYPES`."""
    out_type, number = OUTPUT_DTYPES.index(out_dtype), _product_number(level)
    codes, residual_and_gate = qx.contiguous(), added or (None, None)
    return torch.ops.ditq_cpu.linear_a8(codes, sx, *_parts(weight, bias), out_type, *residual_and_gate, number)


def quantized_linear(
    x: torch.Tensor,
    amax: torch.Tensor | None,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    level: str | None = None,
) -> torch.Tensor:
    """:func:`linear_a8` of :func:`quantize_activation`, in the dtype of ``x`` [M, K], one of
    :data:`ACTIVATION_DTYPES`.
    """
    return torch.ops.ditq_cpu.quantized_linear(_rows(x), amax, *_parts(weight, bias), _product_number(level))


def linear_a16(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    silu: bool = False,
    level: str | None = None,
) -> torch.Tensor | None:
    """:func:`.reference.linear_a16` of what is not empty, up to the order of sums, reading each weight once: for
    :data:`FEW_ROWS` rows. None if a value is not finite or above :data:`LARGEST_OF_FEW_ROWS`.
    """
    entering = _rows(F.silu(x) if silu else x)
    out, is_computed = torch.ops.ditq_cpu.few_rows(
        entering, *_parts(weight, bias), LARGEST_OF_FEW_ROWS, _product_number(level)
    )
    return out.to(x.dtype) if is_computed else None


def _padded(part: torch.Tensor | None) -> torch.Tensor | None:
    """``part`` in fp32, and what may be read behind its last value."""
    if part is None:
        return None
    return F.pad(part.to(torch.float32).flatten(), (0, MOST_LANES))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` as it can be read: of a dtype that is known, rows without gaps."""
    x = x if x.dtype in ACTIVATION_DTYPES else x.to(torch.float32)
    return x if x.stride(1) == 1 else x.contiguous()


def _parts(weight: PackedWeight, bias: torch.Tensor | None) -> tuple[Any, ...]:
    """What all products take of a weight, and the bias."""
    fmt = weight.fmt
    if bias is not None and bias.dtype not in ACTIVATION_DTYPES:
        bias = bias.to(torch.float32)
    group = fmt.group or weight.in_features
    return weight.qweight, weight.scale, weight.group_code if fmt.two_level else None, bias, group, fmt.promoted


def _product_number(level: str | None) -> int:
    return -1 if level is None else product_levels().index(level)
