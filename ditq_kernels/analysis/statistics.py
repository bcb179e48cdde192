"""Running statistics of tensors that come a piece at a time: what is kept does not grow with the number of pieces."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

BINS_PER_OCTAVE = 4
LOWEST_OCTAVE, HIGHEST_OCTAVE = -24, 17  # magnitudes below 2**-24 count as zero, those from 2**17 on as the last bin
BINS = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE


class Histogram:
    """Counts of magnitudes in bins of a quarter octave, positive and negative values apart.

    Attributes:
        positive, negative: int64 [BINS] on the CPU; bin i holds magnitudes from ``edge(i)`` to ``edge(i + 1)``.
        zeros: values of magnitude 0, and all below the first bin.
    """

    def __init__(self) -> None:
        self.positive = torch.zeros(BINS, dtype=torch.int64)
        self.negative = torch.zeros(BINS, dtype=torch.int64)
        self.zeros = 0

    def add(self, x: torch.Tensor) -> None:
        """Count the elements of ``x``, which must be finite."""
        x = x.detach().flatten().to(torch.float32)
        place = torch.log2(x.abs()).sub_(LOWEST_OCTAVE).mul_(BINS_PER_OCTAVE).floor_().clamp_(max=BINS - 1)
        # Negative values go to the upper half; what is too small, to a bin of its own at the end.
        index = torch.where(place < 0, 2.0 * BINS, place + BINS * (x < 0))
        counts = torch.bincount(index.to(torch.int64), minlength=2 * BINS + 1).cpu()
        self.positive += counts[:BINS]
        self.negative += counts[BINS : 2 * BINS]
        self.zeros += int(counts[2 * BINS])

    @property
    def lowest(self) -> float:
        """A bound from below for the values: minus the end of the last bin that holds negative ones."""
        held = torch.nonzero(self.negative)
        return -edge(int(held[-1]) + 1) if len(held) else 0.0

    @property
    def count(self) -> int:
        return int(self.positive.sum() + self.negative.sum()) + self.zeros

    def quantile(self, share: float) -> float:
        """The magnitude that ``share`` of the values do not exceed, to a bin's width (rounded up)."""
        below = self.zeros
        wanted = share * self.count
        for index, found in enumerate((self.positive + self.negative).tolist()):
            if below >= wanted:
                return edge(index)
            below += found
        return edge(BINS)

    def share_below(self, magnitude: float) -> float:
        """Share of values of at most ``magnitude``; within a bin they are taken to be even on the logarithmic scale."""
        if magnitude <= 0:
            return self.zeros / max(self.count, 1)
        at = (math.log2(magnitude) - LOWEST_OCTAVE) * BINS_PER_OCTAVE
        whole = min(max(math.floor(at), 0), BINS)
        both = self.positive + self.negative
        part = (at - whole) * float(both[whole]) if 0 <= at < BINS else 0.0
        return (self.zeros + float(both[:whole].sum()) + part) / max(self.count, 1)


def edge(index: int) -> float:
    """Lower end of bin ``index``."""
    return 2.0 ** (LOWEST_OCTAVE + index / BINS_PER_OCTAVE)


@dataclass
class InputStatistics:
    """What one linear layer is fed over a sampling run.

    Attributes:
        amax, rms: of each step, in order.
        channel_amax: fp32 [K], largest magnitude of each input channel over the whole run.
        channel_square: fp64 [K], sum of squares of each channel.
        tokens: rows seen.
        values: of all elements.
        token_amax: of the largest magnitude of each row.
    """

    amax: list[float] = field(default_factory=list)
    rms: list[float] = field(default_factory=list)
    channel_amax: torch.Tensor | None = None
    channel_square: torch.Tensor | None = None
    tokens: int = 0
    values: Histogram = field(default_factory=Histogram)
    token_amax: Histogram = field(default_factory=Histogram)
    _step_square: float = 0.0
    _step_tokens: int = 0

    def add(self, x: torch.Tensor, step: int) -> None:
        """Add one input [..., K] of step ``step``; steps come in ascending order, each as often as the layer is called.

        Raises:
            ValueError: if it holds NaN or infinite values.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if not rows.numel():
            return
        magnitudes = rows.abs()
        channel_amax = magnitudes.amax(0).cpu()
        if not bool(torch.isfinite(channel_amax).all()):
            raise ValueError("NaN or infinite values")
        square = rows.to(torch.float64).square_().sum(0).cpu()
        if self.channel_amax is None:
            self.channel_amax, self.channel_square = channel_amax, square
        else:
            torch.maximum(self.channel_amax, channel_amax, out=self.channel_amax)
            self.channel_square += square
        while len(self.amax) <= step:  # a step that did not call the layer has no range
            self.amax.append(0.0)
            self.rms.append(0.0)
            self._step_square, self._step_tokens = 0.0, 0
        self._step_square += float(square.sum())
        self._step_tokens += len(rows)
        self.amax[step] = max(self.amax[step], float(channel_amax.max()))
        self.rms[step] = math.sqrt(self._step_square / (self._step_tokens * rows.shape[1]))
        self.tokens += len(rows)
        self.values.add(rows)
        self.token_amax.add(magnitudes.amax(1))

    @property
    def channel_rms(self) -> torch.Tensor:
        """fp32 [K]."""
        return (self.channel_square / max(self.tokens, 1)).sqrt().to(torch.float32)

    def outlier_channels(self, times: float = 8.0) -> list[int]:
        """Channels whose largest magnitude is more than ``times`` the median channel's, the largest first."""
        limit = times * float(self.channel_amax.median())
        found = torch.nonzero(self.channel_amax > limit).flatten()
        return found[self.channel_amax[found].argsort(descending=True)].tolist()

    def share_of_zeros(self, levels: int = 127) -> float:
        """Share of values that round to zero where one scale of ``levels`` steps reaches to the run's largest value."""
        return self.values.share_below(max(self.amax) / levels / 2)
