"""Models without weights, in few bits."""

from __future__ import annotations

from torch import nn

from ...layer.formats import Scheme
from ...layer.linear import QuantLinear
from ...model.conversion import Places
from ...model.planning import plan


def put_empty_layers(model: nn.Module, scheme: str) -> None:
    """Put an empty layer in the place of each that ``scheme`` quantizes."""
    places = Places(model)
    for entry in plan(model, scheme).quantized():
        old = model.get_submodule(entry.name)
        weight = old.weight
        of = Scheme.parse(entry.scheme)
        sizes = old.in_features, old.out_features
        has_bias = old.bias is not None
        places.replace(old, QuantLinear.empty(*sizes, of, bias=has_bias, dtype=weight.dtype, device=weight.device))
