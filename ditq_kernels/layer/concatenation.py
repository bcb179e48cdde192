"""Quantized layers that are fed the same input, as one layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .linear import QuantLinear
from .stored_part import StoredPart

# What a layer stores, and the dimension of it along which outputs lie: rows of codes, else the last.
OUTPUTS_OF = {"qweight": 0, "scale": -1, "group_code": -1, "bias": 0}


def obstacle_to_concatenation(layers: Sequence[nn.Module | None]) -> str | None:
    """Why ``layers`` cannot be joined by :func:`concatenated`, or None."""
    if not all(isinstance(layer, QuantLinear) for layer in layers):
        return "not all of them are quantized"
    first, *others = layers
    for layer in others:
        if layer.scheme != first.scheme:
            return f"their schemes differ ({first.scheme}, {layer.scheme})"
        if layer.in_features != first.in_features:
            return f"their inputs differ (K = {first.in_features}, {layer.in_features})"
        if (layer.bias is None) != (first.bias is None):
            return "one has a bias and another has none"
        if layer.bias is not None and layer.bias.dtype != first.bias.dtype:
            return f"their biases differ ({first.bias.dtype}, {layer.bias.dtype})"
        if layer.qweight.device != first.qweight.device:
            return f"they are on {first.qweight.device} and {layer.qweight.device}"
        if first.input_amax is not None and not torch.equal(layer.input_amax, first.input_amax):
            return "they were calibrated on different inputs"
    return None


@torch.no_grad()
def concatenated(layers: Sequence[QuantLinear]) -> QuantLinear:
    """One layer whose outputs are those of ``layers``, side by side, bit for bit: stored codes, scales and groups are
    joined, and nothing is decoded.

    Raises:
        ValueError: if :func:`obstacle_to_concatenation` names one.
    """
    obstacle = obstacle_to_concatenation(layers)
    if obstacle is not None:
        raise ValueError(f"the layers cannot be joined: {obstacle}")
    first = layers[0]
    joined = QuantLinear.empty(
        first.in_features,
        sum(layer.out_features for layer in layers),
        first.scheme,
        bias=first.bias is not None,
        dtype=first.dtype,
        device="meta",
    )
    for name, dimension in OUTPUTS_OF.items():
        mine = getattr(first, name)
        if mine is not None:
            whole = torch.cat([getattr(layer, name) for layer in layers], dimension)
            stored = nn.Parameter(whole, mine.requires_grad) if name == "bias" else StoredPart(whole)
            setattr(joined, name, stored)
    if first.input_amax is not None:
        joined.input_amax = StoredPart(first.input_amax.clone())
    return joined.train(first.training)
