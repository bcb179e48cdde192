"""Float weights to codes, group parameters and scales: group-wise, to nearest or with one-shot error compensation,
without training.

First a :class:`Grid` is fitted to the weights (which values can be stored in each group), then the weights are rounded
to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..progress import track
from . import cpu_extension
from .formats import CODE4_MAX, INT8_MAX, WeightFormat, largest_multiplier

CLIP_RATIOS = tuple(1 - 0.025 * i for i in range(17))  # what clip="search" tries: 1.0 down to 0.6
DAMPING = 0.01  # added to the moment's diagonal, as a fraction of its mean (Frantar et al., arXiv 2210.17323)
CHUNK = {False: 1 << 18, True: 1 << 24}  # weights quantized at once, on CUDA or not: it bounds temporary memory
COMPENSATION_BLOCK = 128  # columns whose error is spread at once over all later ones


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
    return step, torch.where(downwards, more, fewer)


def _free_zero_point(above: torch.Tensor, below: torch.Tensor, high: int) -> tuple[torch.Tensor, torch.Tensor]:
    step = (above + below) / high
    zero = torch.round(below / _positive(step)).clamp(0, high)
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


def _clip_ratios(clip: float | str | None) -> tuple[float, ...]:
    return CLIP_RATIOS if clip == "search" else (1.0 if clip is None else float(clip),)


def _positive(step: torch.Tensor) -> torch.Tensor:
    """``step`` with zeros replaced by one: an all-zero group has nothing to divide."""
    return torch.where(step > 0, step, torch.ones_like(step))


def _squared_error(groups: torch.Tensor, step: torch.Tensor, zero: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Sum over each group of the squared rounding error; ``groups`` [N, groups, G] to [N, groups]."""
    step, zero = _positive(step).unsqueeze(-1), zero.unsqueeze(-1)
    codes = (torch.round(groups / step) + zero).clamp(low, high)
    return (groups - (codes - zero) * step).square().sum(-1)


def fit_grid(
    w: torch.Tensor, group: int, rules: tuple[RangeRule, ...], clip: float | str | None, low: int, high: int
) -> Grid:
    """The grid of fp32 ``w`` [N, K] in groups of ``group``, with codes ``low`` .. ``high``: for each group, of all
    ``rules`` and clip ratios the one with the smallest squared error; the first of equals.
    """
    groups = _split_groups(w, group)
    above, below = groups.amax(-1).clamp(min=0), (-groups.amin(-1)).clamp(min=0)
    candidates = [rule(above * ratio, below * ratio, high) for ratio in _clip_ratios(clip) for rule in rules]
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
    step, zero, groups = grid.step, grid.zero, _split_groups(w, grid.group)
    largest = [float(largest_multiplier(z)) for z in range(CODE4_MAX + 1)]
    limits = torch.tensor(largest, dtype=step.dtype, device=step.device)[zero.long()]
    scale = (step / limits).amax(1)
    wanted = step / _positive(scale).unsqueeze(1)
    up = torch.minimum(wanted.ceil().clamp(min=1), limits)
    down = wanted.floor().clamp(min=1)
    errors = [_squared_error(groups, scale.unsqueeze(1) * m, zero, 0, CODE4_MAX) for m in (up, down)]
    multiplier = torch.where(errors[1] < errors[0], down, up)
    return replace(grid, step=scale.unsqueeze(1) * multiplier), scale, multiplier


def round_to(grid: Grid, w: torch.Tensor, input_moment: torch.Tensor | None = None) -> torch.Tensor:
    """Codes, as fp32 [N, K], of ``w`` [N, K]: to nearest, or error-compensated for ``input_moment`` [K, K]."""
    if input_moment is not None:
        return _compensated_codes(w, grid, input_moment)
    codes = grid.nearest(_split_groups(w, grid.group), _positive(grid.step).unsqueeze(-1), grid.zero.unsqueeze(-1))
    return codes.flatten(1)[:, : w.shape[1]]


def _split_groups(w: torch.Tensor, group: int) -> torch.Tensor:
    """[N, K] to [N, groups, G]; a shorter last group is filled with zeros, which every range contains."""
    return torch.nn.functional.pad(w, (0, -w.shape[1] % group)).view(w.shape[0], -1, group)


def compensation_bytes(in_features: int) -> int:
    """The most memory that error-compensated rounding takes for a layer of K inputs, beside a few copies of its weight:
    the moment's factor in fp64 and what it is made from.
    """
    return 24 * in_features**2


def _compensated_codes(w: torch.Tensor, grid: Grid, moment: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] rounded column by column, each column's error carried over to the columns not yet rounded.

    The closed form of the optimal brain surgeon (Hassibi and Stork, 1993) for the layer's squared output error, in the
    order of GPTQ (Frantar et al., arXiv 2210.17323): columns in descending order of their input's energy, the grid
    fitted beforehand. It is computed as LDLQ, which is the same (Chee et al., arXiv 2307.13304, theorem 6): what is
    rounded is the weight and the errors so far times a triangular factor of the moment, and nothing is inverted.
    """
    moment = moment.to(w.device)
    diagonal = moment.diagonal().to(torch.float64)
    unseen = diagonal <= 0
    diagonal = torch.where(unseen, diagonal[~unseen].mean() if bool((~unseen).any()) else 1.0, diagonal)
    order = torch.argsort(diagonal, descending=True, stable=True)
    carried = _carried(moment, diagonal, order)
    # Transposed: a column and its errors lie side by side in memory.
    errors, codes = (torch.empty(w.shape[::-1], dtype=torch.float32, device=w.device) for _ in range(2))
    starts = range(0, len(order), COMPENSATION_BLOCK)
    for start in track(starts, len(starts), "block", delay=2):
        columns = order[start : start + COMPENSATION_BLOCK]
        stop = start + len(columns)
        exact = w[:, columns].T.contiguous()
        wanted = torch.addmm(exact, carried[:start, start:stop].T, errors[:start]) if start else exact.clone()
        step, zero = (part.T.contiguous() for part in grid.columns(columns))
        step = _positive(step)
        within, mine = carried[start:stop, start:stop].T.contiguous(), errors[start:stop]
        parts = zip(*(part.unbind() for part in (wanted, step, zero, exact, codes[start:stop], mine)), strict=True)
        for k, (target, step_k, zero_k, exact_k, code, error) in enumerate(parts):
            if k:
                target.addmv_(mine[:k].T, within[k, :k])
            torch.div(target, step_k, out=code).round_().add_(zero_k).clamp_(grid.low, grid.high)
            torch.addcmul(exact_k, code - zero_k, step_k, value=-1, out=error)
    return torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous()


def _carried(moment: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """fp32 [K, K], upper triangular with ones on its diagonal: ``M`` of ``M D M^T``, D diagonal, which is the moment in
    ``order`` and damped. ``diagonal`` stands in for its own. The damping grows tenfold until it can be factored.
    """
    damping = DAMPING * diagonal.mean()
    backwards = order.flip(0)  # the lower factor from the end is the upper one from the beginning
    for _ in range(8):
        damped = moment.index_select(0, backwards).index_select(1, backwards).to(torch.float64)
        damped.diagonal().copy_(diagonal[backwards] + damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            upper = lower.to(torch.float32).flip(0, 1)
            return upper.div_(upper.diagonal().clone())
        damping = damping * 10
    raise ValueError(
        "input_moment cannot be factored even with heavy damping; it must be a sum of outer products x x^T"
    )


def check_clip(clip: float | str | None) -> None:
    """Raise ValueError unless ``clip`` is what :func:`quantize_weight` takes."""
    if not (clip is None or clip == "search" or (isinstance(clip, (int, float)) and 0 < clip <= 1)):
        raise ValueError(f'clip must be None, "search", or a ratio in (0, 1], got {clip!r}')


def _check(
    w: torch.Tensor, fmt: WeightFormat, moment: torch.Tensor | None, clip: float | str | None, zero_point: str
) -> None:
    if w.ndim != 2 or not w.dtype.is_floating_point:
        raise ValueError(f"a weight must be a floating-point [N, K] matrix, got {w.dtype} {tuple(w.shape)}")
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
        ValueError: for weights that are not finite, a group larger than K, or a moment of the wrong shape.
    """
    _check(weight, fmt, input_moment, clip, zero_point)
    weight = weight.detach()
    # Rows are quantized each by itself; error compensation does more for all of them than for each, and the extension
    # takes no memory for them.
    at_once = input_moment is not None or cpu_extension.rounds(weight)
    rows = len(weight) if at_once else _rows_at_once(weight)
    whole: QuantizedWeight | None = None
    for start in range(0, len(weight), max(rows, 1)):
        chunk = weight[start : start + rows]
        part = _quantize_rows(chunk, fmt, input_moment, clip, zero_point)
        if len(chunk) == len(weight):
            return part
        if whole is None:  # at once, and not joined from parts in the end: that would leave holes in memory
            whole = part.of_rows(len(weight))
        whole.fill(slice(start, start + len(chunk)), part)
    return whole


def _rows_at_once(weight: torch.Tensor) -> int:
    return max(1, CHUNK[weight.device.type == "cuda"] // weight.shape[1])


def _quantize_rows(
    w: torch.Tensor, fmt: WeightFormat, input_moment: torch.Tensor | None, clip: float | str | None, zero_point: str
) -> QuantizedWeight:
    if input_moment is None and cpu_extension.rounds(w):
        return _rounded_by_extension(w, fmt, clip, zero_point)
    return _rounded(w.to(torch.float32), fmt, input_moment, clip, zero_point)


def _rounded_by_extension(
    w: torch.Tensor, fmt: WeightFormat, clip: float | str | None, zero_point: str
) -> QuantizedWeight:
    rules = ZERO_POINT_RULES[zero_point] if fmt.two_level else INT8_RULES
    numbers = [RULE_NUMBERS[rule] for rule in rules]
    *parts, doubtful, broken = cpu_extension.quantize_weight(w, fmt, numbers, _clip_ratios(clip))
    if broken.any():
        raise ValueError(_NOT_FINITE)
    found = QuantizedWeight(*parts)
    if not doubtful.any():
        return found
    for some in doubtful.nonzero().flatten().split(_rows_at_once(w)):  # the order of a sum decides: PyTorch's
        again = _rounded(w[some].to(torch.float32), fmt, None, clip, zero_point)
        found.fill(some, again)
    return found


_NOT_FINITE = "the weight holds NaN or infinite values; nothing was quantized"


def _rounded(
    w: torch.Tensor, fmt: WeightFormat, input_moment: torch.Tensor | None, clip: float | str | None, zero_point: str
) -> QuantizedWeight:
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
    codes = round_to(grid, w, input_moment)
    return QuantizedWeight(codes.to(torch.uint8 if fmt.two_level else torch.int8), scale, *parameters)
