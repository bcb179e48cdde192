"""Models that adapters (LoRA and its kin, by peft) are attached to: which layers are the model's own."""

from __future__ import annotations

import re
import sys

from torch import nn

BASE = "base_layer"  # peft's name for the layer that an adapter is put around


def without_adapters(model: nn.Module) -> nn.Module:
    """The model itself, of which a ``PeftModel`` is a wrapper."""
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def own_name(name: str) -> str:
    """The name that a layer has in its model without adapters."""
    return re.sub(rf"\.{BASE}(?=\.|$)", "", name.removeprefix("base_model.model."))


def adapters_modules(model: nn.Module) -> set[nn.Module]:
    """All modules that came with adapters: of a layer that has some, everything but the layer itself."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:  # then nobody has attached one
        return set()
    return {
        module
        for layer in model.modules()
        if isinstance(layer, tuners.BaseTunerLayer)
        for name, child in layer.named_children()
        if name != BASE
        for module in child.modules()
    }
