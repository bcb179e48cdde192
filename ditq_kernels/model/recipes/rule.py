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
    """Where a division of layers' input channels can be folded, because a linear layer makes what they are fed.

    Names are relative to a block. Of the producer's outputs, cut into ``chunks`` equal parts, part ``shift`` reaches
    the consumers channel by channel; where there is a ``gain``, they are fed ``x * (1 + gain) + shift``.

    Attributes:
        block: a regular expression for the blocks' names.
        consumers: linear layers that all are fed the same, and nothing else is.
        producer: the linear layer.
    """

    block: str
    consumers: tuple[str, ...]
    producer: str
    chunks: int = 1
    shift: int = 0
    gain: int | None = None


@dataclass(frozen=True)
class Recipe:
    """The rules for one architecture, in order: the first that matches decides.

    Attributes:
        architecture: the name of the model's class.
        rules: a layer that none of them matches stays in 16 bits.
        folds: what :func:`ditq_kernels.model.smoothing.smooth` can smooth.
    """

    architecture: str
    rules: tuple[Rule, ...]
    folds: tuple[Fold, ...] = ()

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def rule_for(self, name: str) -> Rule:
        """The rule that decides about the layer called ``name``."""
        for rule in self.rules:
            if re.fullmatch(rule.pattern, name):
                return rule
        return Rule(re.escape(name), "keep", f"the recipe for {self.architecture} has no rule for it")
