"""The recipe for a model that has none of its own, derived from the model's structure."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn

from .rule import Recipe, Rule

# As named in diffusers (norm1.linear, norm1_context.linear, time_emb_proj) and the original DiT (adaLN_modulation.1).
MODULATION = r"(?i:(.*\.)?(\w*norm\w*\.linear|\w*modulation\w*(\..*)?|\w*adaln\w*(\..*)?|\w*time_emb_proj))"
EMBEDDER = r"(?i:(.*\.)?\w*embedder\w*\..*)"


def general_recipe(model: nn.Module) -> Recipe:
    """Rules for any ``model``: linear layers in repeated blocks take the scheme, those outside stay in 16 bits.

    A repeated block is a child of an ``nn.ModuleList`` or ``nn.Sequential`` that has a sibling of its own type, and
    holds linear layers.
    """
    inside = "|".join(_repeated_blocks(model)) or r"(?!)"  # (?!) matches nothing
    inside = rf"(?:{inside})\."
    return Recipe(
        type(model).__name__,
        (
            Rule(inside + EMBEDDER, "keep", "embedder in a block: few weights, and an error here reaches every token"),
            Rule(
                inside + MODULATION,
                "weight_only",
                "modulation by its name: one row per sample, bound by reading weights",
            ),
            Rule(inside + r".*", "scheme", "in a repeated block"),
            Rule(r".*", "keep", "outside the repeated blocks (embedder, final layer or head): few weights, sensitive"),
        ),
    )


def _repeated_blocks(model: nn.Module) -> list[str]:
    """Patterns of the blocks' names; containers within blocks add nothing new and are left out."""
    patterns: list[str] = []
    outermost: list[str] = []
    for name, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        if any(name.startswith(block + ".") or name == block for block in outermost):
            continue
        types = Counter(type(child) for child in container.children())
        # A bare Linear holds no linear layers: an MLP written as a Sequential is not a stack of blocks.
        blocks = [
            child_name
            for child_name, child in container.named_children()
            if types[type(child)] > 1 and any(isinstance(m, nn.Linear) for m in child.modules() if m is not child)
        ]
        prefix = f"{name}." if name else ""
        outermost += [prefix + block for block in blocks]
        if blocks:
            patterns.append(re.escape(prefix) + f"(?:{'|'.join(re.escape(block) for block in blocks)})")
    return patterns
