"""Weights of any bit width, rounded as the library rounds and left in floating point: what formats that no kernel knows
would do to the pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...layer.compensation import compensated_codes
from ...layer.grid import INT8_RULES, ZERO_POINT_RULES, fit_grid, to_two_levels


@dataclass(frozen=True)
class WeightRounding:
    """How weights are rounded.

    Attributes:
        bits: of a code, 2 to 8.
        group: inputs per group; None: one group per output channel.
        zero_point: a key of :data:`ditq_kernels.layer.grid.ZERO_POINT_RULES`; 8 bits are symmetric.
        two_level: whether the groups' steps are small multiples of one step per channel (4 bits only); else floats.
        clip: as :func:`ditq_kernels.layer.quantizer.quantize_weight` takes it.
        compensated: whether errors are compensated for.
        gain_restored: whether each channel is multiplied afterwards so that its outputs, over the inputs of the
            moment given, have the original's gain.
    """

    bits: int
    group: int | None
    zero_point: str
    two_level: bool = False
    clip: float | str | None = None
    compensated: bool = False
    gain_restored: bool = False

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits: codes, and per group one byte (two-level) or an fp16 scale and the bits of its zero point, or
        per channel an fp32 scale.
        """
        group = self.group or in_features
        of_channel = 32 / in_features if self.two_level or self.group is None else 0
        zero = {"symmetric": 0, "eighth_level": 1, "free": self.bits, "best": self.bits}[self.zero_point]
        of_group = 8 / group if self.two_level else (16 + zero) / group if self.group else zero / group
        return self.bits + of_group + of_channel

    def apply(self, weight: torch.Tensor, moment: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 [N, K]: ``weight`` [N, K] after rounding; ``moment`` [K, K] of its inputs, for compensation and gain."""
        w = weight.to(torch.float32)
        if self.bits == 8:
            rules, low, high = INT8_RULES, -127, 127
        else:
            rules, low, high = ZERO_POINT_RULES[self.zero_point], 0, 2**self.bits - 1
        grid = fit_grid(w, self.group or w.shape[1], rules, self.clip, low, high)
        if self.two_level:
            grid, _, _ = to_two_levels(grid, w)
        values = grid.values(compensated_codes(w, grid, moment) if self.compensated else grid.round(w))
        if not self.gain_restored:
            return values
        weighted = w.double() @ moment.double()
        gain = (weighted * values).sum(1, keepdim=True) / (weighted * w).sum(1, keepdim=True)
        return (values / gain).float()
