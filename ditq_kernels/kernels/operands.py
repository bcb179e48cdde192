"""What every product is given, in one value, so that the ways to compute it have one signature."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..layer.formats import WeightFormat


class Operands(NamedTuple):
    """Attributes:
    x: [M, K] int8, or activations in their own dtype; rows may be strided, columns not.
    sx: fp32 [M] of int8 activations, else None.
    qweight, scale, group_code: the stored weight (:mod:`ditq_kernels.layer.packing`).
    bias: [N] or None.
    fmt: of the weight.
    out_dtype: of the result; int32 means the accumulators as they are.
    silu: whether SiLU is applied to ``x`` first.
    """

    x: torch.Tensor
    sx: torch.Tensor | None
    qweight: torch.Tensor
    scale: torch.Tensor
    group_code: torch.Tensor | None
    bias: torch.Tensor | None
    fmt: WeightFormat
    out_dtype: torch.dtype
    silu: bool = False

    def output(self) -> torch.Tensor:
        """[M, N], not yet written."""
        return torch.empty((self.x.shape[0], self.qweight.shape[0]), dtype=self.out_dtype, device=self.x.device)
