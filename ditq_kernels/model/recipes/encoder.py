"""Text encoders, which transformers' models are: any of them, by its structure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from .general import general_recipe
from .rule import Recipe

WEIGHTS_ONLY = "in a repeated block of an encoder: it runs once a picture, and int8 would lose its outlying activations"


def encoder_recipe(model: nn.Module, rows: Mapping[str, float] | None = None) -> Recipe:
    """The general recipe with the scheme's weights only."""
    general = general_recipe(model, rows)
    rules = (
        replace(rule, treatment="weight_only", reason=WEIGHTS_ONLY) if rule.treatment == "scheme" else rule
        for rule in general
    )
    return Recipe(general.architecture, tuple(rules))
