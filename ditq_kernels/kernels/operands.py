"""What every product is given, in one value, so that the ways to compute it have one signature."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..layer.gated_residual import GatedResidual
from ..layer.packed_weight import PackedWeight


class Operands(NamedTuple):
    """Attributes:
    x: [M, K] int8, or activations in their own dtype; rows may be strided, columns not.
    sx: fp32 [M] of int8 activations, else None.
    weight: as it is stored.
    bias: [N] or None.
    out_dtype: of the result; int32 means the accumulators as they are.
    silu: whether SiLU is applied to ``x`` first.
    added: what the product is added to, or None.
    """

    x: torch.Tensor
    sx: torch.Tensor | None
    weight: PackedWeight
    bias: torch.Tensor | None
    out_dtype: torch.dtype
    silu: bool = False
    added: GatedResidual | None = None

    def output(self) -> torch.Tensor:
        """[M, N], not yet written."""
        return torch.empty((self.x.shape[0], self.weight.out_features), dtype=self.out_dtype, device=self.x.device)
