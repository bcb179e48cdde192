"""Passes that a model's blocks make one by one, made at once."""

from __future__ import annotations

from torch import nn

from . import shared_projections
from .fused_blocks import fuse_block
from .substituted_class import is_substituted, restore
from .wrappers import bare


def fuse(model: nn.Module) -> None:
    """See :func:`ditq_kernels.model.pipelines.fuse`."""
    for module in list(bare(model).modules()):
        if is_substituted(module):
            continue
        if shared_projections.is_attention(module):
            shared_projections.share(module)
        else:
            fuse_block(module)


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`."""
    for module in list(bare(model).modules()):
        if not is_substituted(module):
            continue
        if shared_projections.is_attention(module):
            shared_projections.part(module)
        else:
            restore(module)
