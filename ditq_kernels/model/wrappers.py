"""What others put around a model or its layers: adapters (LoRA and its kin, by peft), and ``torch.compile``."""

from __future__ import annotations

import sys

from torch import nn

BASE = "base_layer"  # peft's name for the layer that an adapter is put around
ORIGINAL = "original_module"  # and for the module that an adapter trains a copy of
COMPILED = "_orig_mod"  # PyTorch's name for the module that it has compiled


def bare(model: nn.Module) -> nn.Module:
    """The model itself, of which a ``PeftModel`` is a wrapper, and what ``torch.compile`` gives another."""
    peft = sys.modules.get("peft")
    while True:
        if COMPILED in model._modules:
            model = model._modules[COMPILED]
        elif peft is not None and isinstance(model, peft.PeftModel):
            model = model.get_base_model()
        else:
            return model


def own_name(name: str) -> str:
    """The name that a layer has in the bare model."""
    parts = [part for part in name.split(".") if part not in (BASE, ORIGINAL, COMPILED)]
    return ".".join(parts).removeprefix("base_model.model.")


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name to peft's wrapper, of every layer that adapters are put around."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:  # then nobody has attached one
        return {}
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, tuners.BaseTunerLayer)}


def trained_copies(model: nn.Module) -> dict[str, nn.Module]:
    """Name to peft's wrapper, of every module of which an adapter trains a whole copy (``modules_to_save``)."""
    other = sys.modules.get("peft.utils.other")
    kind = getattr(other, "AuxiliaryTrainingWrapper", None)
    return {name: one for name, one in model.named_modules() if kind is not None and isinstance(one, kind)}


def adapters_modules(model: nn.Module) -> set[nn.Module]:
    """All modules that came with adapters: of a layer that has some, everything but the layer itself."""
    wrapped = [(layer, BASE) for layer in adapted_layers(model).values()]
    wrapped += [(copy, ORIGINAL) for copy in trained_copies(model).values()]
    return {
        module
        for wrapper, own in wrapped
        for name, child in wrapper.named_children()
        if name != own
        for module in child.modules()
    }


def models_side_by_side(model: nn.Module) -> list[nn.Module]:
    """Those that ``model`` is nothing but a list of, such as a pipeline's ControlNets; none of any other model. Each is
    stored by itself, and has blocks of its own.
    """
    children = list(model.children())
    together = list(children[0]) if len(children) == 1 and isinstance(children[0], nn.ModuleList) else []
    return together if all(hasattr(one, "save_pretrained") for one in together) else []
