"""Quantized layers that are fed the same input, called as one and stored as they were."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from .concatenation import OUTPUTS_OF, concatenated, obstacle_to_concatenation
from .linear import QuantLinear
from .ops import is_differentiated
from .quantized_input import QuantizedInput

_STORED = (*OUTPUTS_OF, "input_amax")
_JOINING: dict[int, threading.Lock] = {}


class SharedInput:
    """The layers ``names`` of ``parent``, which are fed the same input, called as one: ``shared(x)`` is what each of
    them gives. No module, so that ``parent`` keeps its parameters under their names.

    Their parameters become views of the memory of one joined layer, so that nothing is stored twice and what is written
    to a layer is seen. Where they cannot be joined as they are (one has an adapter, or a hook that would not be called)
    and where gradients are wanted, they are called one by one. Layers that have moved since are joined again; only a
    compiled graph does not see what is put behind a parameter (``parameter.data = ...``) after it was compiled.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        self.parent, self.names = parent, tuple(names)
        # The joined layer, if they can be joined, and where their parameters were then.
        self._found: tuple[QuantLinear | None, tuple[int, ...]] = None, ()
        self._members: list[QuantLinear] = []  # that know of it, and may be views

    def layers(self) -> list[nn.Module | None]:
        """As they are now."""
        return [getattr(self.parent, name, None) for name in self.names]

    def __call__(self, x: torch.Tensor | QuantizedInput) -> tuple[torch.Tensor, ...]:
        joined, layers = self.joined(), self.layers()
        if joined is not None and joined.qweight.device == x.device:
            return joined(x).split([layer.out_features for layer in layers], -1)
        return tuple(layer(x) for layer in layers)

    def joined(self) -> QuantLinear | None:
        """The layer that does what they do, as things are; None if they are to be called one by one."""
        layers = self.layers()
        if is_differentiated() or _is_traced():
            return None
        if not all(is_bare(layer) for layer in layers):
            self.forget()
            return None
        return self._current(layers)

    def join(self) -> bool:
        """Join the layers if they are not; whether they are."""
        layers = self.layers()
        if not all(is_bare(layer) for layer in layers):
            self.forget()
            return False
        return self._current(layers) is not None

    def _current(self, layers: list[QuantLinear]) -> QuantLinear | None:
        # A compiler cannot ask where parameters are; layers say of themselves when they are moved or replaced.
        if not torch.compiler.is_compiling() and self._found[1] != _where(layers):
            with _joining():  # other threads that come meanwhile must not read memory that is replaced
                if self._found[1] != _where(layers):
                    self._found = self._join(layers), _where(layers)
        return self._found[0]

    @torch.inference_mode(False)  # which parameters outlive
    @torch.no_grad()
    def _join(self, layers: list[QuantLinear]) -> QuantLinear | None:
        if any(layer.shared_input not in (None, self) for layer in layers) or len(set(layers)) < len(layers):
            return None  # one of them is fed otherwise, too
        if obstacle_to_concatenation(layers) is not None or any(map(_is_placed, layers)):
            return None  # and is not asked again before one of them moves
        joined = concatenated(layers)
        sizes = [layer.out_features for layer in layers]
        for name, dimension in OUTPUTS_OF.items():
            if getattr(joined, name) is not None:
                for layer, part in zip(layers, getattr(joined, name).data.split(sizes, dimension), strict=True):
                    getattr(layer, name).data = part
        if joined.input_amax is not None:  # of the same value in all, which is seen if it changes in all
            joined.input_amax.data = layers[0].input_amax.data
        for layer in layers:
            layer.shared_input = self
        self._members = layers
        return joined

    def forget(self) -> None:
        """What was joined is no longer what is stored, or not called."""
        self._found = None, ()

    @torch.no_grad()
    def part(self) -> None:
        """Give each layer memory of its own again."""
        self.forget()
        for layer in self._members:
            for name in OUTPUTS_OF:
                stored = getattr(layer, name)
                if stored is not None:
                    stored.data = stored.data.clone(memory_format=torch.contiguous_format)
            layer.shared_input = None
        self._members = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy's parameters are copies, each by itself.
        return {"parent": self.parent, "names": self.names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["parent"], state["names"])  # older files hold more


def _joining() -> threading.Lock:
    """Of all instances, which are copied and pickled; and of this process: in a forked one nobody is who held it."""
    return _JOINING.setdefault(os.getpid(), threading.Lock())


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called when ``module`` is, or in its place, that would not be if its work were done
    elsewhere.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
    )


def is_bare(layer: nn.Module | None) -> bool:
    """Whether nothing but the layer's own product happens when it is called."""
    return type(layer) is QuantLinear and not has_hooks(layer)


def _is_traced() -> bool:
    """Whether calls are written down for another process: a program that is exported has the layers' parameters."""
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag  # is_exporting() is true of all that PyTorch 2.10 compiles
    return torch._C._get_tracing_state() is not None


def _is_placed(layer: QuantLinear) -> bool:
    """Whether its memory is of a kind that others would not be: shared with processes, or pinned."""
    weight = layer.qweight
    return weight.device.type == "cpu" and (weight.is_shared() or weight.is_pinned())


def _where(layers: Sequence[QuantLinear]) -> tuple[int, ...]:
    """Addresses of all that they store: others when one is moved, cast or replaced. And of calibrated ranges, which may
    come to differ, how often they were written to.
    """
    stored = [layer._parameters.get(name) for layer in layers for name in _STORED]
    ranges = [layer.input_amax for layer in layers if layer.input_amax is not None]
    written = [one._version for one in ranges if not one.is_inference()]
    return (*(0 if one is None else one.data_ptr() for one in stored), *written)
