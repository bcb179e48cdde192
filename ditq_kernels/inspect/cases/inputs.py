"""Weights and activations of the cases: signed, with outliers and rows of zeros, the same in every process."""

from __future__ import annotations

import functools

import torch

from ...layer.formats import CODE4_MAX, WeightFormat, largest_multiplier
from ...layer.linear import QuantLinear
from ...layer.packed_weight import PackedWeight
from ...layer.packing import pack_groups

PADDING = 16  # activations are slices of rows that are this much wider
# (multiplier, zero point) of a group of two levels, and how many there are.
_PAIRS = [(m, z) for z in range(CODE4_MAX + 1) for m in range(1, largest_multiplier(z) + 1)]
PAIRS = len(_PAIRS)


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


def with_every_pair(weight: PackedWeight, first_output: int) -> PackedWeight:
    """Its codes drawn anew; its groups, from those of ``first_output`` on, with all :data:`PAIRS` in turn."""
    if not weight.fmt.two_level:
        return weight
    groups, outputs = weight.group_code.shape
    turn = (torch.arange(groups * outputs).view(outputs, groups).T - first_output * groups) % PAIRS
    multiplier, zero_point = torch.tensor(_PAIRS)[turn].unbind(-1)
    codes = torch.randint(0, 256, weight.qweight.shape, generator=generator(3), dtype=torch.uint8)
    # In memory as a layer has it: below the ops nobody looks.
    return weight._replace(qweight=codes, group_code=pack_groups(multiplier, zero_point).contiguous())
