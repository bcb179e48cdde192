"""Which layers of which architecture are quantized, which stay in 16 bits, and why: one data file per architecture."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .auraflow import AURAFLOW
from .chroma import CHROMA
from .cogvideox import COGVIDEOX
from .cosmos import COSMOS
from .dit import DIT
from .encoder import encoder_recipe
from .flux import FLUX
from .flux2 import FLUX2
from .general import general_recipe, repeated_blocks
from .hunyuan_dit import HUNYUAN_DIT
from .hunyuan_video import HUNYUAN_VIDEO
from .ltx import LTX
from .lumina2 import LUMINA2
from .mochi import MOCHI
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .rule import Fold, Recipe, Rule, Treatment
from .sana import SANA
from .sd3 import SD3
from .wan import WAN

RECIPES: dict[str, Recipe] = {
    recipe.architecture: recipe
    for recipe in (
        DIT,
        PIXART,
        SD3,
        FLUX,
        FLUX2,
        SANA,
        HUNYUAN_DIT,
        HUNYUAN_VIDEO,
        COGVIDEOX,
        WAN,
        LTX,
        QWEN_IMAGE,
        LUMINA2,
        AURAFLOW,
        MOCHI,
        CHROMA,
        COSMOS,
    )
}
# For whatever has a base class of this name, from the model's structure.
KINDS = {"PreTrainedModel": encoder_recipe}

__all__ = ["RECIPES", "Fold", "Recipe", "Rule", "Treatment", "general_recipe", "recipe_for", "repeated_blocks"]


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
