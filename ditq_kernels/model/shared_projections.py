"""Attention that quantizes an input once and multiplies it by several weights in one product."""

from __future__ import annotations

import functools
import inspect
import operator
import os
import sys
from typing import Any

import torch
from torch import nn

from ..layer.linear import QuantLinear
from ..layer.quantized_input import QuantizedInput
from ..layer.shared_input import SharedInput, has_hooks, is_bare
from .substituted_class import Forward, class_before, restore, substitute

# Layers that attention feeds the same input.
SELF_ATTENTION = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
CROSS_ATTENTION = (("to_k", "to_v"), ("add_k_proj", "add_v_proj"))
# diffusers' processors that do nothing with an attention's inputs but hand them to these layers.
HANDING_ON = (
    *("AttnProcessor", "AttnProcessor2_0", "FluxAttnProcessor", "JointAttnProcessor2_0"),
    *("QwenDoubleStreamAttnProcessor2_0", "WanAttnProcessor"),
)
ADDED = "ditq_added"  # an argument of attentions that share: Added, of layers that adds_at is true of
Added = dict[str, tuple[torch.Tensor, torch.Tensor]]  # (residual, gate), by the name of a layer
_CODE = "_ditq_code"  # where an attention keeps a KnownCode
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
        _is_known(attention)  # asked now, it need not be when it is compiled


def shares(module: nn.Module) -> bool:
    """Whether :func:`share` has joined layers of ``module``."""
    return _SHARED in vars(module)


def part(attention: nn.Module) -> None:
    """Undo :func:`share`."""
    for one in vars(attention).pop(_SHARED):
        one.part()
    vars(attention).pop(_CODE, None)
    restore(attention)


def hands_on(attention: nn.Module) -> bool:
    """Whether an input of ``attention`` is seen by its layers alone, so that it may be quantized already."""
    return not has_hooks(attention) and not getattr(attention, "residual_connection", False) and _is_known(attention)


class KnownCode:
    """What was found out of functions: whether they are those that their library has written."""

    def __init__(self, functions: tuple[Any, ...] = (), is_original: bool = False) -> None:
        self.functions, self.is_original = functions, is_original

    def is_of(self, functions: tuple[Any, ...]) -> bool:
        """Whether it was found out of these."""
        return len(functions) == len(self.functions) and all(map(operator.is_, functions, self.functions))

    def __reduce__(self) -> tuple:
        return KnownCode, ()  # somebody may have put others into the classes when it is read again


def _is_known(attention: nn.Module) -> bool:
    """Whether the code that ``attention`` runs is diffusers' own, and hands inputs on: nobody has put another into the
    class of the attention or of its processor.
    """
    kind = type(attention.processor)
    functions = class_before(type(attention)).forward, kind.__call__
    known = attention.__dict__.get(_CODE)
    if known is not None and known.is_of((*functions, kind)):
        return known.is_original
    if torch.compiler.is_compiling():  # which cannot see where code is from
        return False
    is_known = kind.__name__ in HANDING_ON and _is_of_diffusers(attention.processor)
    hands_on = is_known and all(is_written_in(function, "diffusers") for function in functions)
    vars(attention)[_CODE] = KnownCode((*functions, kind), hands_on)
    return hands_on


def is_written_in(function: Any, package: str) -> bool:
    """Whether the code of ``function`` is from ``package``, and nobody has put another in its place."""
    found, code = sys.modules.get(package), getattr(function, "__code__", None)
    if found is None or code is None:
        return False
    return code.co_filename.startswith(os.path.dirname(found.__file__))


def does_nothing(dropout: nn.Module) -> bool:
    """Whether ``dropout`` gives what it is given."""
    return type(dropout) is nn.Dropout and not (dropout.training and dropout.p) and not has_hooks(dropout)


def joined_at(attention: nn.Module, name: str) -> QuantLinear | None:
    """The layer that takes the input of the layer ``name`` of ``attention`` in its place, if that may be quantized
    already; or None.
    """
    if not hands_on(attention):
        return None
    for one in _shared_by(attention):
        if name in one.names:
            return one.joined()
    return None


def adds(layer: nn.Module, residual: torch.Tensor, gate: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether ``layer``, fed with activations of ``dtype``, can add its product to ``residual``, times ``gate``, in the
    pass that makes it.
    """
    return (
        is_bare(layer)
        and layer.scheme.activation.bits == 8
        and residual.dtype == gate.dtype == dtype
        and residual.is_contiguous()
    )


def adds_at(attention: nn.Module, name: str, residual: torch.Tensor, gate: torch.Tensor) -> bool:
    """Whether :func:`adds` is true of the layer ``name`` that an output of ``attention`` comes from, and nothing
    happens to the output behind it.
    """
    if not hands_on(attention) or not _shared_by(attention) or getattr(attention, "rescale_output_factor", 1) != 1:
        return False
    layer = getattr(attention, name, None)
    if name == "to_out":
        layer, dropout = layer if len(layer) == 2 else (None, None)
        if dropout is None or not does_nothing(dropout):
            return False
    return layer is not None and adds(layer, residual, gate, residual.dtype)


def _shared_by(attention: nn.Module) -> tuple[SharedInput, ...]:
    """What layers of ``attention`` share, unless it calls others (diffusers' own joined ones), or is but a copy that
    shares its state.
    """
    if getattr(attention, "fused_projections", False):
        return ()
    return tuple(one for one in attention.__dict__.get(_SHARED, ()) if one.parent is attention)


def _is_of_diffusers(processor: Any) -> bool:
    """Whether ``processor`` has no parameters and comes with diffusers: others may look at the layers, or keep things
    in the attention.
    """
    return not isinstance(processor, nn.Module) and type(processor).__module__.startswith("diffusers.")


def _sharing(original: Forward) -> Forward:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        added = kwargs.pop(ADDED, {})
        shared = _shared_by(self)
        if not shared or not _is_of_diffusers(self.processor):
            return original(self, *args, **kwargs)
        seen = _Projections(self, shared, added)
        found = original(seen, *args, **kwargs)
        # What the processor makes of the one output, a division by 1, is not waited for: a compiler drops it then.
        return seen.kept.output if added and isinstance(found, torch.Tensor) else found

    return forward


class _Projections:
    """An attention as its own code is shown it during one call: layers that share an input are called at once, when the
    first of them is.
    """

    def __init__(self, attention: nn.Module, shared: tuple[SharedInput, ...], added: Added) -> None:
        self._attention, self.kept = attention, _Kept()
        for name, pair in added.items():
            layer = getattr(attention, name)
            if name == "to_out":
                self.to_out = functools.partial(layer[0].added_to, *pair), self.kept
            else:
                setattr(self, name, functools.partial(layer.added_to, *pair))
        if added and not torch.compiler.is_compiling():
            self.rescale_output_factor = _One()
        for one in shared:
            outputs = _Outputs(one)
            for place, name in enumerate(one.names):
                setattr(self, name, functools.partial(outputs, place))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)


class _Kept:
    """In the place of a dropout that does nothing: keeps what it is given."""

    output: torch.Tensor | None = None

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        self.output = output
        return output


class _One:
    """What tensors divided by it are no other than."""

    def __rtruediv__(self, x: torch.Tensor) -> torch.Tensor:
        return x


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
