"""Pictures as models sample them, [-1, 1], and as others want them."""

from __future__ import annotations

import torch


def to_unit_range(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] to [0, 1], clamped."""
    return (pictures / 2 + 0.5).clamp(0, 1)


def to_levels(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] to uint8, 0 to 255."""
    return (to_unit_range(pictures) * 255).round().to(torch.uint8)
