"""The recipe for a model that has none of its own, derived from the model's structure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from ..wrappers import models_side_by_side, own_name
from .rule import Recipe, Rule

# As named in diffusers (norm1.linear, norm1_context.linear, time_emb_proj) and the original DiT (adaLN_modulation.1).
MODULATION = r"(?i:(.*\.)?(\w*norm\w*\.linear|\w*modulation\w*(\..*)?|\w*adaln\w*(\..*)?|\w*time_emb_proj))"
EMBEDDER = r"(?i:(.*\.)?\w*embedder\w*\..*)"
FEW_WEIGHTS = 1 << 24  # 34 MB in 16 bits: what a layer may take that is kept there


def general_recipe(model: nn.Module, rows: Mapping[str, float] | None = None) -> Recipe:
    """Rules for any ``model``: linear layers in repeated blocks take the scheme, those outside stay in 16 bits. A layer
    of one row per sample, a modulation, takes the scheme's weights only, and so does a large one that would stay.

    A repeated block is a child of an ``nn.ModuleList`` or ``nn.Sequential`` that has a sibling of its own type, and
    holds linear layers. Whole models side by side are none: each has its own.

    Args:
        rows: rows per sample that layers are fed, by name, where that was seen; others are known by their names.
    """
    inside = rf"(?:{_any_of(repeated_blocks(model))})\."
    rows = rows or {}
    one_row = _any_of(name for name, count in rows.items() if count <= 1)
    not_seen = rf"(?!(?:{_any_of(rows)})$)"
    large = _any_of(
        own_name(name)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.in_features * layer.out_features > FEW_WEIGHTS
    )
    return Recipe(
        type(model).__name__,
        (
            Rule(rf"(?={inside}{EMBEDDER}$)(?:{large})", "weight_only", "embedder in a block, of many weights"),
            Rule(inside + EMBEDDER, "keep", "embedder in a block: few weights, and an error here reaches every token"),
            Rule(
                rf"(?={inside})(?:{one_row})",
                "weight_only",
                "fed one row per sample, as was seen: bound by reading weights",
            ),
            Rule(
                not_seen + inside + MODULATION,
                "weight_only",
                "modulation by its name: one row per sample, bound by reading weights",
            ),
            Rule(inside + r".*", "scheme", "in a repeated block"),
            Rule(rf"(?:{large})", "weight_only", "outside the repeated blocks, of many weights"),
            Rule(r".*", "keep", "outside the repeated blocks (embedder, final layer or head): few weights, sensitive"),
        ),
    )


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, names)) or r"(?!)"  # which matches nothing


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name to block, of every repeated block of ``model`` that is not within another."""
    found: dict[str, nn.Module] = {}
    together = models_side_by_side(model)
    for name, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or list(container) == together:
            continue
        if any(name.startswith(f"{block}.") or name == block for block in found):
            continue
        types = Counter(type(child) for child in container.children())
        # A bare Linear holds no linear layers: an MLP written as a Sequential is not a stack of blocks.
        found |= {
            f"{name}.{child_name}" if name else child_name: child
            for child_name, child in container.named_children()
            if types[type(child)] > 1 and any(isinstance(m, nn.Linear) for m in child.modules() if m is not child)
        }
    return found
