"""Shapes, inputs and the error budget that all tests of products share."""

from __future__ import annotations

import torch
from torch import nn

# (M, N, K): one token to many, on both sides of the small-M path and of every tile; N and K ragged, K not a multiple of
# 128, 64 or 32.
SHAPES = (
    (1, 64, 128),
    (2, 96, 200),
    (15, 32, 320),
    (16, 40, 256),
    (17, 80, 130),
    (63, 136, 384),
    (129, 72, 150),
    (257, 64, 256),
    (17, 24, 2240),
    (530, 136, 128),
)


def activations(rows: int, columns: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Signed [rows, columns] with outlier channels and, where there is room, a row of zeros; rows are strided, as
    slices of a wider tensor are.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns + 16, generator=generator)
    x[:, ::37] *= 20
    if rows > 2:
        x[1] = 0
    return x.to(device=device, dtype=dtype)[:, :columns]


def linear(out_features: int, in_features: int, device: torch.device, seed: int = 0) -> nn.Linear:
    """A layer whose channels and groups differ in size and lean to one side, with one channel of zeros."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(in_features, out_features)
    size = 4 * torch.rand(out_features, 1, generator=generator) * (1 + torch.arange(in_features) // 32 % 3)
    weight = size * (torch.randn(out_features, in_features, generator=generator) + 0.5)
    weight[out_features // 2] = 0
    layer.weight.data = weight / in_features**0.5
    layer.bias.data = torch.randn(out_features, generator=generator)
    return layer.to(device)


def assert_within_budget(actual: torch.Tensor, same_precision: torch.Tensor, exact: torch.Tensor) -> None:
    """``actual`` may be off by twice what PyTorch is off at that precision, and by one rounding to its dtype.

    Args:
        actual: the kernel's output.
        same_precision: PyTorch's output for the same operands at the kernel's precision.
        exact: the fp64 result for the same operands.
    """
    assert actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    exact = exact.to(actual.device)
    error = (actual.to(torch.float64) - exact).abs()
    budget = 2 * (same_precision.to(torch.float64) - exact).abs().max() + torch.finfo(actual.dtype).eps * exact.abs()
    worst = (error - budget).max()
    assert worst <= 0, f"error exceeds the budget by {worst:.3g} (largest error {error.max():.3g})"
