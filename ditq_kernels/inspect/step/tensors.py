"""Tensors without contents: which share memory, how much it is, whether it is a model's weights, and whether what gave
them computes anything.
"""

from __future__ import annotations

from typing import Any

import torch

from .work import ACTIVATION, WEIGHT

MAKES_ROOM = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "empty_permuted"}


def memory_of(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory."""
    return tensor.untyped_storage()._cdata


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All of them, in order."""
    return [one for one in torch.utils._pytree.tree_leaves(value) if isinstance(one, torch.Tensor)]


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of memory that its elements take: those of an expanded dimension once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def role_of(tensor: torch.Tensor, weights: set[int]) -> str:
    return WEIGHT if memory_of(tensor) in weights else ACTIVATION


def is_view(function: Any, arguments: Any, result: Any) -> bool:
    """Whether an operation computes nothing: it makes room, or its result is memory that it was given."""
    if function.overloadpacket.__name__.rstrip("_") in MAKES_ROOM or not tensors_in(result):
        return True
    if function._schema.is_mutable:
        return False
    given = {memory_of(one) for one in tensors_in(arguments)}
    return all(memory_of(one) in given for one in tensors_in(result))
