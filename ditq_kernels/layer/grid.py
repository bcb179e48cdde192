"""Which values can be stored in each group of a weight: the rules that place the levels of a code, and which of their
grids suits a group best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .formats import CODE4_MAX, largest_multiplier

CLIP_RATIOS = tuple(1 - 0.025 * i for i in range(17))  # what clip="search" tries: 1.0 down to 0.6


@dataclass(frozen=True)
class Grid:
    """The values that can be stored: ``step * (code - zero)`` with ``low <= code <= high``.

    Attributes:
        step, zero: fp32 [N, groups].
        low, high: the range of a code.
        group: inputs per group (K for one group per channel).
    """

    step: torch.Tensor
    zero: torch.Tensor
    low: int
    high: int
    group: int

    def columns(self, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(step, zero) of the given columns of the weight, each [N, len(columns)]."""
        groups = columns // self.group
        return self.step[:, groups], self.zero[:, groups]

    def nearest(self, w: torch.Tensor, step: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Codes, as fp32, of the stored values nearest to ``w``; ties to even."""
        return (torch.round(w / step) + zero).clamp(self.low, self.high)

    def round(self, w: torch.Tensor) -> torch.Tensor:
        """Codes, as fp32, of ``w`` [N, K] to nearest."""
        codes = self.nearest(split_groups(w, self.group), positive(self.step).unsqueeze(-1), self.zero.unsqueeze(-1))
        return codes.flatten(1)[:, : w.shape[1]]

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """fp32 [N, K]: what ``codes`` [N, K] stand for."""
        step, zero = self.columns(torch.arange(codes.shape[1], device=codes.device))
        return (codes - zero) * step


# A range rule maps a group's largest excursions above and below zero (a, b >= 0) and the largest of the codes 0 .. h to
# (step, zero point).
RangeRule = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def _symmetric(above: torch.Tensor, below: torch.Tensor, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.maximum(above, below) / (high // 2), torch.full_like(above, high // 2 + 1)


def _eighth_level(above: torch.Tensor, below: torch.Tensor, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    # Sixteen codes around zero leave one level over: the side that reaches further gets it.
    fewer, more = float(high // 2), float(high // 2 + 1)
    downwards = below >= above
    step = torch.where(
        downwards, torch.maximum(below / more, above / fewer), torch.maximum(above / more, below / fewer)
    )
    return step, torch.where(downwards, torch.full_like(above, more), torch.full_like(above, fewer))


def _free_zero_point(above: torch.Tensor, below: torch.Tensor, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    step = (above + below) / high
    zero = torch.round(below / positive(step)).clamp(0, high)
    # Rounding the zero point shifts the grid by up to half a step; widen the step until both ends are inside again.
    step = torch.maximum(above / (high - zero).clamp(min=1), below / zero.clamp(min=1))
    return step, zero


def _symmetric_int8(above: torch.Tensor, below: torch.Tensor, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.maximum(above, below) / high, torch.zeros_like(above)


ZERO_POINT_RULES: dict[str, tuple[RangeRule, ...]] = {
    "symmetric": (_symmetric,),
    "eighth_level": (_eighth_level,),
    "free": (_free_zero_point,),
    "best": (_eighth_level, _free_zero_point),  # per group, the one with the smaller squared error
}
INT8_RULES: tuple[RangeRule, ...] = (_symmetric_int8,)
DEFAULT_ZERO_POINT = "best"
# The numbers that csrc/cpu/quantize_weight.h gives them.
RULE_NUMBERS = {_symmetric: 0, _eighth_level: 1, _free_zero_point: 2, _symmetric_int8: 3}


def clip_ratios(clip: float | str | None) -> tuple[float, ...]:
    return CLIP_RATIOS if clip == "search" else (1.0 if clip is None else float(clip),)


def positive(step: torch.Tensor) -> torch.Tensor:
    """``step`` with zeros replaced by one: an all-zero group has nothing to divide."""
    return torch.where(step > 0, step, torch.ones_like(step))


def _squared_error(groups: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Sum over each group of the squared rounding error; ``groups`` [N, groups, G] to [N, groups]."""
    step, zero = positive(step).unsqueeze(-1), zero.unsqueeze(-1)
    codes = (torch.round(groups / step) + zero).clamp(low, high)
    return (groups - (codes - zero) * step).square().sum(-1)


def fit_grid(
    w: torch.Tensor, group: int, rules: tuple[RangeRule, ...], clip: float | str | None, low: int, high: int
) -> Grid:
    """The grid of fp32 ``w`` [N, K] in groups of ``group``, with codes ``low`` .. ``high``: for each group, of all
    ``rules`` and clip ratios the one with the smallest squared error; the first of equals.
    """
    groups = split_groups(w, group)
    above, below = groups.amax(-1).clamp(min=0), (-groups.amin(-1)).clamp(min=0)
    candidates = [rule(above * ratio, below * ratio, high) for ratio in clip_ratios(clip) for rule in rules]
    step, zero = candidates[0]
    if len(candidates) > 1:
        error = _squared_error(groups, step, zero, low, high)
        for other_step, other_zero in candidates[1:]:
            other = _squared_error(groups, other_step, other_zero, low, high)
            better = other < error
            error = torch.where(better, other, error)
            step, zero = torch.where(better, other_step, step), torch.where(better, other_zero, zero)
    return Grid(step, zero, low, high, group)


def to_two_levels(grid: Grid, w: torch.Tensor) -> tuple[Grid, torch.Tensor, torch.Tensor]:
    """``grid`` with steps that two-level groups can store, and (scale [N], multiplier [N, groups]): the channel scale
    that lets every group reach its step, and per group the multiplier that suits it.

    A step between two multiples of the scale is rounded up (no weight is clipped) or down (finer steps, the extremes
    clipped), by squared error on ``w`` [N, K].
    """
    step, zero, groups = grid.step, grid.zero, split_groups(w, grid.group)
    largest = [float(largest_multiplier(z)) for z in range(CODE4_MAX + 1)]
    limits = torch.tensor(largest, dtype=step.dtype, device=step.device)[zero.long()]
    scale = (step / limits).amax(1)
    wanted = step / positive(scale).unsqueeze(1)
    up = torch.minimum(wanted.ceil().clamp(min=1), limits)
    down = wanted.floor().clamp(min=1)
    errors = [_squared_error(groups, scale.unsqueeze(1) * m, zero, 0, CODE4_MAX) for m in (up, down)]
    multiplier = torch.where(errors[1] < errors[0], down, up)
    return replace(grid, step=scale.unsqueeze(1) * multiplier), scale, multiplier


def split_groups(w: torch.Tensor, group: int) -> torch.Tensor:
    """[N, K] to [N, groups, G]; a shorter last group is filled with zeros, which every range contains."""
    return torch.nn.functional.pad(w, (0, -w.shape[1] % group)).view(w.shape[0], -1, group)
