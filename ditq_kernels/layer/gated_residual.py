"""What a transformer block does with a product: adds it to the stream that it came from, times a gate."""

from __future__ import annotations

from typing import NamedTuple

import torch


class GatedResidual(NamedTuple):
    """Attributes:
    residual: [M, N], in the product's dtype.
    gate: [B, N] in that dtype, a row for each M / B rows.
    """

    residual: torch.Tensor
    gate: torch.Tensor

    @property
    def rows_per_gate(self) -> int:
        return max(1, len(self.residual) // max(1, len(self.gate)))

    def outputs(self, first: int, count: int) -> GatedResidual:
        """Of ``count`` outputs, from ``first`` on."""
        return GatedResidual(self.residual[:, first : first + count], self.gate[:, first : first + count])

    def plus(self, y: torch.Tensor) -> torch.Tensor:
        """``residual + gate * y`` of a product ``y`` [M, N] that is rounded to its dtype; in fp32, and rounded once."""
        if not y.numel():
            return y
        residual, product = (part.unflatten(0, (len(self.gate), -1)) for part in (self.residual, y))
        return torch.addcmul(residual, self.gate.unsqueeze(1), product).flatten(0, 1)
