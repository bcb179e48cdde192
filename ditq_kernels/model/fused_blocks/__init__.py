"""Transformer blocks of diffusers in fewer passes: one file for each way to build them."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..substituted_class import Forward, is_substituted, restore, substitute
from . import joint_attention
from .basic import BASIC
from .block import FusedBlock
from .flux import FLUX_DOUBLE, FLUX_SINGLE
from .qwen_image import QWEN_IMAGE
from .rms_norm import RMS_NORM
from .sd3 import SD3
from .timesteps import TIMESTEPS
from .wan import WAN

FUSED_BLOCKS: dict[str, FusedBlock] = {
    block.name: block for block in (BASIC, SD3, FLUX_DOUBLE, FLUX_SINGLE, WAN, QWEN_IMAGE, TIMESTEPS, RMS_NORM)
}

_FUSED = "_ditq_fused"  # that a block is, in its state

__all__ = ["FUSED_BLOCKS", "FusedBlock", "fuse_block", "unfuse_block"]


def fuse_block(module: nn.Module) -> None:
    """Let ``module`` make fewer passes, in place, if it is a block that is known."""
    cls = type(module)
    fused = FUSED_BLOCKS.get(cls.__name__)
    if fused is None or is_substituted(module) or not _is_of_diffusers(cls):
        return
    _, *parameters = inspect.signature(cls.forward).parameters
    if tuple(parameters) == fused.parameters and fused.is_known(module):
        vars(module)[_FUSED] = True
        substitute(module, _fusing)


def unfuse_block(module: nn.Module) -> None:
    """Undo :func:`fuse_block`; hooks that were put on the block between them keep the forward that they found."""
    vars(module).pop(joint_attention.CODE, None)
    if vars(module).pop(_FUSED, False):
        restore(module)


def _is_of_diffusers(cls: type[nn.Module]) -> bool:
    """Whether the class and its forward are diffusers', and nobody has put another in its place."""
    return all(one.__module__.partition(".")[0] == "diffusers" for one in (cls, inspect.unwrap(cls.forward)))


def _fusing(original: Forward) -> Forward:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        fused = FUSED_BLOCKS[type(self).__name__]
        runs = self.__dict__.get(_FUSED, False) and fused.runs(self)
        result = fused.forward(self, *args, **kwargs) if runs else None
        return original(self, *args, **kwargs) if result is None else result

    return forward
