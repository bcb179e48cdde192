"""Which layers of which architecture are quantized, which stay in 16 bits, and why: one data file per architecture."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .dit import DIT
from .encoder import encoder_recipe
from .general import general_recipe
from .rule import Fold, Recipe, Rule, Treatment

RECIPES: dict[str, Recipe] = {recipe.architecture: recipe for recipe in (DIT,)}
# For whatever has a base class of this name, from the model's structure.
KINDS = {"PreTrainedModel": encoder_recipe}

__all__ = ["RECIPES", "Fold", "Recipe", "Rule", "Treatment", "general_recipe", "recipe_for"]


def recipe_for(model: nn.Module, rows: Mapping[str, float] | None = None) -> Recipe:
    """The recipe of ``model``'s class or of the nearest base class that has one, else the general one, which makes use
    of ``rows`` per sample of layers, where they were seen.
    """
    for base in type(model).__mro__:
        if base.__name__ in RECIPES:
            return RECIPES[base.__name__]
        if base.__name__ in KINDS:
            return KINDS[base.__name__](model, rows)
    return general_recipe(model, rows)
