"""Attention that quantizes an input once and multiplies it by several weights in one product."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from ..layer.concatenation import SharedInput
from ..layer.linear import QuantLinear
from ..layer.quantized_input import QuantizedInput
from .substituted_class import Forward, restore, substitute

# Layers that attention feeds the same input.
SELF_ATTENTION = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
CROSS_ATTENTION = (("to_k", "to_v"), ("add_k_proj", "add_v_proj"))
_SHARED = "_ditq_shared"  # where an attention keeps its layers that share an input


def is_attention(module: nn.Module) -> bool:
    """Whether ``module`` is an attention as diffusers builds them."""
    return hasattr(module, "processor") and hasattr(module, "to_k")


def share(attention: nn.Module) -> None:
    """Join the layers of ``attention`` that share inputs, if it has some that can be joined."""
    if "__class__" in inspect.unwrap(type(attention).forward).__code__.co_freevars:
        return  # it calls super(), which only an instance of the class can do
    is_cross = getattr(attention, "is_cross_attention", False)
    found = (SharedInput(attention, names) for names in (CROSS_ATTENTION if is_cross else SELF_ATTENTION))
    shared = tuple(one for one in found if None not in one.layers() and one.join())
    if shared:
        vars(attention)[_SHARED] = shared
        substitute(attention, _sharing)


def part(attention: nn.Module) -> None:
    """Undo :func:`share`."""
    for one in vars(attention).pop(_SHARED):
        one.part()
    restore(attention)


def joined_at(attention: nn.Module, name: str) -> QuantLinear | None:
    """The layer that takes the input of the layer ``name`` of ``attention`` in its place, as things are; or None."""
    for one in vars(attention).get(_SHARED, ()):
        if name in one.names:
            return one.joined()
    return None


def _sharing(original: Forward) -> Forward:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return original(_Projections(self, self.__dict__[_SHARED]), *args, **kwargs)

    return forward


class _Projections:
    """An attention as its own code is shown it during one call: layers that share an input are called at once, when the
    first of them is.
    """

    def __init__(self, attention: nn.Module, shared: tuple[SharedInput, ...]) -> None:
        self._attention = attention
        for one in shared:
            outputs = _Outputs(one)
            for place, name in enumerate(one.names):
                setattr(self, name, functools.partial(outputs, place))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


class _Outputs:
    """What layers that share an input give, until they are called with another."""

    def __init__(self, shared: SharedInput) -> None:
        self._shared = shared
        self._x: torch.Tensor | QuantizedInput | None = None
        self._outputs: tuple[torch.Tensor, ...] = ()

    def __call__(self, place: int, x: torch.Tensor | QuantizedInput) -> torch.Tensor:
        if self._x is not x:
            self._x, self._outputs = x, self._shared(x)
        return self._outputs[place]
