"""A stored weight in one value, as everything below the ops is given it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .formats import WeightFormat


class PackedWeight(NamedTuple):
    """An [N, K] weight as :mod:`.packing` stores it.

    Attributes:
        qweight: the codes, in the layout of ``fmt``.
        scale: fp32 [N], or [groups, N].
        group_code: uint8 [groups, N] of two-level formats, else None.
        in_features: K, which the stored bytes may be padded beyond.
    """

    qweight: torch.Tensor
    scale: torch.Tensor
    group_code: torch.Tensor | None
    fmt: WeightFormat
    in_features: int

    @property
    def out_features(self) -> int:
        """N."""
        return self.qweight.shape[0]
