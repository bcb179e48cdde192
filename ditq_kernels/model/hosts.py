"""Libraries that load and save models in their own way, and are told when one of their models is quantized."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from .wrappers import bare, models_side_by_side

# By the package that a class, or a base of it, comes from: our module that has an ``attach(model)``. Named and not
# imported: each needs its library, and stands above everything that quantizes.
HOSTS = {
    "diffusers": "ditq_kernels.integrations.diffusers",
    "transformers": "ditq_kernels.integrations.transformers",
}
DIRECTORIES = "ditq_kernels.integrations.directories"  # our module that loads what they write


def host_of(model: Any) -> str | None:
    """The name of our module for the library that a model or pipeline comes from; None if there is none."""
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    known = [package for package in HOSTS if package in packages and hasattr(model, "save_pretrained")]
    return HOSTS[known[0]] if known else None


def _offloading(module: nn.Module) -> Any:
    """The hook by which diffusers' group offloading moves ``module``, or None."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry.get_hook("group_offloading") if registry is not None else None


def is_grouped(module: nn.Module) -> bool:
    """Whether diffusers' group offloading moves ``module``: it puts other memory behind parameters."""
    return _offloading(module) is not None


def is_on_disk(module: nn.Module) -> bool:
    """Whether diffusers' group offloading keeps the weights of ``module`` in files: what it leaves in their place looks
    like weights.
    """
    return getattr(getattr(_offloading(module), "group", None), "offload_to_disk_path", None) is not None


def tell(model: nn.Module) -> None:
    """Let the library that ``model`` comes from know that it is quantized, or each of several side by side."""
    model = bare(model)
    for one in models_side_by_side(model) or [model]:
        host = host_of(one)
        if host is not None:
            importlib.import_module(host).attach(one)
