"""What a recipe is: rules that say, by a layer's name, what becomes of it and why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Treatment = Literal["keep", "weight_only", "scheme"]


@dataclass(frozen=True)
class Rule:
    """One line of a recipe.

    Attributes:
        pattern: a regular expression that must match the whole of a layer's name (``re.fullmatch``).
        treatment: "keep": stays in 16 bits; "weight_only": the scheme's weights with 16-bit activations;
            "scheme": the scheme.
        reason: why, in words that a plan prints.
    """

    pattern: str
    treatment: Treatment
    reason: str


@dataclass(frozen=True)
class Fold:
    """Where a division of layers' input channels can be folded, because of the layers that make what they are fed.

    Names are relative to a block. Those that a block lacks do not count; where the sizes do not fit, a fold says
    nothing about the block.

    Attributes:
        block: a regular expression for the blocks' names.
        consumers: linear layers that are fed the same channels; nothing else in the block is fed them.
        producers: what makes these channels. Of a linear layer's outputs, cut into ``chunks`` equal parts, those in
            ``shifts`` reach the consumers channel by channel, and where there are ``gains``, the consumers are fed
            ``x * (1 + gain) + shift``. Of a norm, its learnt weight (and bias) reaches them so. Several add up, or
            serve different tokens.
        inputs: which of how many equal parts of the consumers' input channels: (0, 1) is all of them.
    """

    block: str
    consumers: tuple[str, ...]
    producers: tuple[str, ...]
    chunks: int = 1
    shifts: tuple[int, ...] = (0,)
    gains: tuple[int, ...] = ()
    inputs: tuple[int, int] = (0, 1)


# What an MLP's activation function feeds, as models call it; of single-stream blocks the product that it and the
# attention feed.
BEHIND_ACTIVATION = (
    r"(.+\.)?(\w*mlp|ff|ffn|ff_context|feed_forward|fc)\."
    r"(net\.2|linear_2|linear_out|out_projection|fc2|w2|down_proj|c_proj|wo)"
    r"|single_transformer_blocks\.\d+\.(proj_out|attn\.to_out)"
)


@dataclass(frozen=True)
class Recipe:
    """The rules for one architecture, in order: the first that matches decides.

    Attributes:
        architecture: the name of the model's class.
        rules: a layer that none of them matches stays in 16 bits.
        folds: what :func:`ditq_kernels.model.smoothing.smooth` can smooth.
        behind_activation: a regular expression for the layers that GELU, SiLU or another activation function feeds,
            alone or beside other inputs.
    """

    architecture: str
    rules: tuple[Rule, ...]
    folds: tuple[Fold, ...] = ()
    behind_activation: str = BEHIND_ACTIVATION

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def is_behind_activation(self, name: str) -> bool:
        """Whether the layer called ``name`` is fed by an activation function."""
        return re.fullmatch(self.behind_activation, name) is not None

    def rule_for(self, name: str) -> Rule:
        """The rule that decides about the layer called ``name``."""
        for rule in self.rules:
            if re.fullmatch(rule.pattern, name):
                return rule
        return Rule(re.escape(name), "keep", f"the recipe for {self.architecture} has no rule for it")
