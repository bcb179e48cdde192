"""Libraries that load and save models in their own way, and are told when one of their models is quantized."""

from __future__ import annotations

import importlib

from torch import nn

from .wrappers import bare

# By the package that a model's class, or a base of it, comes from: our module that has an ``attach(model)``. Named and
# not imported: each needs its library, and stands above everything that quantizes.
HOSTS = {
    "diffusers": "ditq_kernels.integrations.diffusers",
    "transformers": "ditq_kernels.integrations.transformers",
}


def tell(model: nn.Module) -> None:
    """Let the library that ``model`` comes from know that it is quantized."""
    model = bare(model)
    packages = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    for package in packages & HOSTS.keys():
        importlib.import_module(HOSTS[package]).attach(model)
