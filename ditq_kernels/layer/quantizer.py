"""Float weights to codes, group parameters and scales: group-wise, to nearest or with one-shot error compensation,
without training.

First a :class:`.grid.Grid` is fitted to the weights (which values can be stored in each group), then the weights are
rounded to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from . import cpu_extension
from .compensation import compensated_codes
from .formats import CODE4_MAX, INT8_MAX, WeightFormat
from .grid import (
    DEFAULT_ZERO_POINT,
    INT8_RULES,
    RULE_NUMBERS,
    ZERO_POINT_RULES,
    Grid,
    clip_ratios,
    fit_grid,
    to_two_levels,
)

CHUNK = {False: 1 << 18, True: 1 << 24}  # weights quantized at once, on CUDA or not: it bounds temporary memory


@dataclass(frozen=True)
class QuantizedWeight:
    """An [N, K] weight as integers and scales, not yet packed.

    Attributes:
        codes: int8 in -127..127, or uint8 in 0..15, [N, K].
        scale: fp32 [N], or [groups, N] where groups have float scales.
        multiplier, zero_point: uint8 [groups, N] for two-level formats, else None.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    multiplier: torch.Tensor | None = None
    zero_point: torch.Tensor | None = None

    def of_rows(self, rows: int) -> QuantizedWeight:
        """Room for as many rows of such a weight."""
        others = (self.scale, self.multiplier, self.zero_point)
        return QuantizedWeight(
            self.codes.new_empty(rows, self.codes.shape[1]),
            *(None if part is None else part.new_empty(*part.shape[:-1], rows) for part in others),
        )

    def fill(self, rows: slice | torch.Tensor, part: QuantizedWeight) -> None:
        """Put those of ``part`` in the place of ``rows``, a slice or their numbers."""
        self.codes[rows] = part.codes
        for mine, theirs in zip(
            (self.scale, self.multiplier, self.zero_point), (part.scale, part.multiplier, part.zero_point), strict=True
        ):
            if mine is not None:
                mine[..., rows] = theirs

    def grid(self, fmt: WeightFormat) -> Grid:
        """That the codes are of."""
        group = fmt.group or self.codes.shape[1]
        if not fmt.two_level:
            step = self.scale.view(-1, len(self.codes)).T
            return Grid(step, torch.zeros_like(step), -INT8_MAX, INT8_MAX, group)
        step = self.scale.unsqueeze(1) * self.multiplier.T
        return Grid(step, self.zero_point.T.to(torch.float32), 0, CODE4_MAX, group)


def check_clip(clip: float | str | None) -> None:
    """Raise ValueError unless ``clip`` is what :func:`quantize_weight` takes."""
    if not (clip is None or clip == "search" or (isinstance(clip, (int, float)) and 0 < clip <= 1)):
        raise ValueError(f'clip must be None, "search", or a ratio in (0, 1], got {clip!r}')


def _check(
    w: torch.Tensor, fmt: WeightFormat, moment: torch.Tensor | None, clip: float | str | None, zero_point: str
) -> None:
    if w.ndim != 2 or not w.dtype.is_floating_point:
        raise ValueError(f"a weight must be a floating-point [N, K] matrix, got {w.dtype} {tuple(w.shape)}")
    if w.numel() == 0:
        raise ValueError(f"a weight of {list(w.shape)} holds nothing to quantize")
    if fmt.group is not None and fmt.group > w.shape[1]:
        raise ValueError(
            f"groups of {fmt.group} are larger than K = {w.shape[1]}; use a smaller group, or none (one scale per "
            "output channel)"
        )
    check_clip(clip)
    if zero_point not in ZERO_POINT_RULES:
        raise ValueError(f"unknown zero_point {zero_point!r}; allowed: {', '.join(ZERO_POINT_RULES)}")
    if moment is not None:
        if moment.shape != (w.shape[1], w.shape[1]):
            raise ValueError(f"input_moment must be [K, K] = [{w.shape[1]}, {w.shape[1]}], got {list(moment.shape)}")
        if not torch.isfinite(moment).all():
            raise ValueError("input_moment holds NaN or infinite values; calibrate again on finite activations")


@torch.no_grad()
def quantize_weight(
    weight: torch.Tensor,
    fmt: WeightFormat,
    *,
    input_moment: torch.Tensor | None = None,
    clip: float | str | None = None,
    zero_point: str = DEFAULT_ZERO_POINT,
) -> QuantizedWeight:
    """Quantize ``weight`` [N, K], any float dtype, to ``fmt``.

    Args:
        input_moment: [K, K], the sum of ``x x^T`` over observed inputs; if given, rounding is error-compensated, else
            to nearest.
        clip: None keeps each group's whole range; a ratio in (0, 1] shrinks it; "search" finds the ratio of least
            squared error per group.
        zero_point: how 4-bit groups place their levels, a key of :data:`ZERO_POINT_RULES`.

    Raises:
        ValueError: for weights that are empty or not finite, a group larger than K, or a moment of the wrong shape.
    """
    _check(weight, fmt, input_moment, clip, zero_point)
    weight = weight.detach()
    nearest = _to_nearest(weight, fmt, clip, zero_point)
    if input_moment is None:
        return nearest
    codes = compensated_codes(weight.to(torch.float32), nearest.grid(fmt), input_moment)
    return replace(nearest, codes=codes.to(nearest.codes.dtype))


def _to_nearest(weight: torch.Tensor, fmt: WeightFormat, clip: float | str | None, zero_point: str) -> QuantizedWeight:
    # Rows are quantized each by itself, and the extension takes no memory for them.
    rows = len(weight) if cpu_extension.rounds(weight) else _rows_at_once(weight)
    whole: QuantizedWeight | None = None
    for start in range(0, len(weight), max(rows, 1)):
        chunk = weight[start : start + rows]
        part = _quantize_rows(chunk, fmt, clip, zero_point)
        if len(chunk) == len(weight):
            return part
        if whole is None:  # at once, and not joined from parts in the end: that would leave holes in memory
            whole = part.of_rows(len(weight))
        whole.fill(slice(start, start + len(chunk)), part)
    return whole


def _rows_at_once(weight: torch.Tensor) -> int:
    return max(1, CHUNK[weight.device.type == "cuda"] // weight.shape[1])


def _quantize_rows(w: torch.Tensor, fmt: WeightFormat, clip: float | str | None, zero_point: str) -> QuantizedWeight:
    if cpu_extension.rounds(w):
        return _rounded_by_extension(w, fmt, clip, zero_point)
    return _rounded(w.to(torch.float32), fmt, clip, zero_point)


def _rounded_by_extension(
    w: torch.Tensor, fmt: WeightFormat, clip: float | str | None, zero_point: str
) -> QuantizedWeight:
    rules = ZERO_POINT_RULES[zero_point] if fmt.two_level else INT8_RULES
    numbers = [RULE_NUMBERS[rule] for rule in rules]
    *parts, doubtful, broken = cpu_extension.quantize_weight(w, fmt, numbers, clip_ratios(clip))
    if broken.any():
        raise ValueError(_NOT_FINITE)
    found = QuantizedWeight(*parts)
    if not doubtful.any():
        return found
    for some in doubtful.nonzero().flatten().split(_rows_at_once(w)):  # the order of a sum decides: PyTorch's
        again = _rounded(w[some].to(torch.float32), fmt, clip, zero_point)
        found.fill(some, again)
    return found


_NOT_FINITE = "the weight holds NaN or infinite values; nothing was quantized"


def _rounded(w: torch.Tensor, fmt: WeightFormat, clip: float | str | None, zero_point: str) -> QuantizedWeight:
    if not torch.isfinite(w).all():
        raise ValueError(_NOT_FINITE)
    group = fmt.group or w.shape[1]
    if fmt.two_level:
        grid = fit_grid(w, group, ZERO_POINT_RULES[zero_point], clip, 0, CODE4_MAX)
        grid, scale, multiplier = to_two_levels(grid, w)
        parameters = (multiplier.T.contiguous().to(torch.uint8), grid.zero.T.contiguous().to(torch.uint8))
    else:
        grid = fit_grid(w, group, INT8_RULES, clip, -INT8_MAX, INT8_MAX)
        scale = grid.step.T.contiguous() if fmt.promoted else grid.step[:, 0].contiguous()
        parameters = (None, None)
    codes = grid.round(w)
    return QuantizedWeight(codes.to(torch.uint8 if fmt.two_level else torch.int8), scale, *parameters)
