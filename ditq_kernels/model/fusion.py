"""Passes that a model's blocks make one by one, made at once."""

from __future__ import annotations

from torch import nn

from . import hosts, shared_projections
from .fused_blocks import fuse_block, unfuse_block
from .wrappers import bare


def fuse(model: nn.Module) -> None:
    """See :func:`ditq_kernels.model.pipelines.fuse`."""
    shares = not any(map(hosts.is_grouped, model.modules()))
    for module in list(bare(model).modules()):
        if not shared_projections.is_attention(module):
            fuse_block(module)
        elif shares and not shared_projections.shares(module):
            shared_projections.share(module)


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`."""
    for module in list(bare(model).modules()):
        unfuse_block(module)
    part_projections(model)


def part_projections(model: nn.Module) -> None:
    """Let attentions call their layers one by one again, each in memory of its own."""
    for module in list(bare(model).modules()):
        if shared_projections.shares(module):
            shared_projections.part(module)
