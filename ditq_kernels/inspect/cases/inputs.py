"""Weights and activations of the cases: signed, with outliers and rows of zeros, the same in every process."""

from __future__ import annotations

import functools

import torch

from ...layer.formats import WeightFormat
from ...layer.linear import QuantLinear
from ...layer.packed_weight import PackedWeight

PADDING = 16  # activations are slices of rows that are this much wider


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """[rows, columns] with outlier channels and a row of zeros."""
    x = torch.randn(rows, columns + PADDING, generator=generator(seed))
    x[:, ::37] *= 20
    if rows > 2:
        x[1] = 0
    return x.to(dtype)[:, :columns]


@functools.lru_cache(maxsize=256)
def stored(fmt: WeightFormat, out_features: int, in_features: int) -> tuple[PackedWeight, torch.Tensor]:
    """(weight, fp32 bias) whose channels and groups differ in size and lean to one side; one channel is zero."""
    source = generator(1)
    layer = torch.nn.Linear(in_features, out_features)
    size = 4 * torch.rand(out_features, 1, generator=source) * (1 + torch.arange(in_features) // 32 % 3)
    weight = size * (torch.randn(out_features, in_features, generator=source) + 0.5)
    weight[out_features // 2] = 0
    layer.weight.data = weight / in_features**0.5
    layer.bias.data = torch.randn(out_features, generator=source)
    scheme = fmt.name.replace("w8", "w8a16").replace("w4", "w4a16")
    quantized = QuantLinear.from_linear(layer, scheme)
    parts = quantized.packed_weight
    return parts._replace(qweight=parts.qweight.detach(), scale=parts.scale.detach()), layer.bias.detach()


def with_powers_of_two(weight: PackedWeight) -> PackedWeight:
    """Its scales replaced by powers of two, so that scaled integers are exact in 16 bits."""
    powers = torch.randint(-3, 4, weight.scale.shape, generator=generator(2))
    return weight._replace(scale=torch.exp2(powers.float()))
