"""An input that was quantized by the pass before: what a layer is given in a tensor's place."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class QuantizedInput:
    """Activations [..., K] as int8 products take them. Code that hands activations on asks no more of them than their
    shape and kind.

    Attributes:
        codes: int8 [M, K], one row per token.
        scale: fp32 [M].
        shape: of the activations.
        dtype: theirs, and that of what is made of them.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        return self.codes.device
