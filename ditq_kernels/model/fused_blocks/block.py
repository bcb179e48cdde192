"""A transformer block of diffusers, or a module that blocks call, in fewer passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...layer.ops import is_differentiated
from ...layer.shared_input import has_hooks
from ..shared_projections import does_nothing


@dataclass(frozen=True)
class FusedBlock:
    """Attributes:
    name: of the block's class in diffusers.
    parameters: of its forward, which may be others in another version.
    is_known: whether a block of that class is built as ``forward`` expects it.
    skipped: names of modules whose own forward is not called: what hangs on them would not be.
    forward: the block's, in fewer passes; or None, for an input that it does not take.
    """

    name: str
    parameters: tuple[str, ...]
    is_known: Callable[[nn.Module], bool]
    skipped: tuple[str, ...]
    forward: Callable[..., Any]

    def runs(self, block: nn.Module) -> bool:
        """Whether ``forward`` may take the place of the block's own now."""
        return not (
            is_differentiated()
            or torch._C._is_any_autocast_enabled()
            or block.training
            or any(has_hooks(module) or _drops(module) for module in self.modules_skipped(block))
        )

    def modules_skipped(self, block: nn.Module) -> Sequence[nn.Module]:
        """Those of ``skipped`` that ``block`` has."""
        modules = (_submodule(block, name) for name in self.skipped)
        return [module for module in modules if module is not None]


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.Dropout) and not does_nothing(module)


def _submodule(block: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        block = getattr(block, part, None)
        if block is None:
            return None
    return block
