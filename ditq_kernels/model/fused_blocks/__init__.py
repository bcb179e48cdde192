"""Transformer blocks of diffusers in fewer passes: one file for each way to build them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..substituted_class import Forward, substitute
from .basic import BASIC
from .block import FusedBlock
from .flux import FLUX_DOUBLE, FLUX_SINGLE
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .timesteps import TIMESTEPS
from .wan import WAN

FUSED_BLOCKS: dict[str, FusedBlock] = {
    block.name: block for block in (BASIC, SD3, FLUX_DOUBLE, FLUX_SINGLE, WAN, QWEN_IMAGE, TIMESTEPS)
}

__all__ = ["FUSED_BLOCKS", "FusedBlock", "fuse_block"]


def fuse_block(module: nn.Module) -> None:
    """Let ``module`` make fewer passes, in place, if it is a block that is known."""
    cls = type(module)
    fused = FUSED_BLOCKS.get(cls.__name__)
    if fused is None or cls.__module__.partition(".")[0] != "diffusers":
        return
    _, *parameters = inspect.signature(cls.forward).parameters
    if tuple(parameters) == fused.parameters and fused.is_known(module):
        substitute(module, _fusing)


def _fusing(original: Forward) -> Forward:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fused = FUSED_BLOCKS[type(self).__name__]
        result = fused.forward(self, *args, **kwargs) if fused.runs(self) else None
        return original(self, *args, **kwargs) if result is None else result

    return forward
