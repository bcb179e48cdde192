"""peft's adapters over quantized layers: one property of theirs, put right."""

from __future__ import annotations

import functools

import torch

from ..layer.linear import QuantLinear


@functools.cache
def teach() -> None:
    """Let an adapted layer's ``weight`` be its layer's, where that is a :class:`QuantLinear`: peft gives the codes of
    layers that have a ``qweight``, whose dtype and shape mean nothing to a model. Does nothing without peft.
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    original = BaseTunerLayer.weight.fget

    def weight(self: BaseTunerLayer) -> torch.Tensor:
        layer = self.get_base_layer()
        return layer.weight if isinstance(layer, QuantLinear) else original(self)

    BaseTunerLayer.weight = property(weight)
