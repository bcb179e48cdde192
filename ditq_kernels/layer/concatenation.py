"""Quantized layers that are fed the same input, as one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .linear import QuantLinear, StoredPart
from .quantized_input import QuantizedInput

# What a layer stores, and the dimension of it along which outputs lie: rows of codes, else the last.
_OUTPUTS_OF = {"qweight": 0, "scale": -1, "group_code": -1, "bias": 0}


def obstacle_to_concatenation(layers: Sequence[nn.Module | None]) -> str | None:
    """Why ``layers`` cannot be joined by :func:`concatenated`, or None."""
    if not all(isinstance(layer, QuantLinear) for layer in layers):
        return "not all of them are quantized"
    first, *others = layers
    for layer in others:
        if layer.scheme != first.scheme:
            return f"their schemes differ ({first.scheme}, {layer.scheme})"
        if layer.in_features != first.in_features:
            return f"their inputs differ (K = {first.in_features}, {layer.in_features})"
        if (layer.bias is None) != (first.bias is None):
            return "one has a bias and another has none"
        if layer.bias is not None and layer.bias.dtype != first.bias.dtype:
            return f"their biases differ ({first.bias.dtype}, {layer.bias.dtype})"
        if layer.qweight.device != first.qweight.device:
            return f"they are on {first.qweight.device} and {layer.qweight.device}"
        if first.input_amax is not None and not torch.equal(layer.input_amax, first.input_amax):
            return "they were calibrated on different inputs"
    return None


@torch.no_grad()
def concatenated(layers: Sequence[QuantLinear]) -> QuantLinear:
    """One layer whose outputs are those of ``layers``, side by side, bit for bit: stored codes, scales and groups are
    joined, and nothing is decoded.

    Raises:
        ValueError: if :func:`obstacle_to_concatenation` names one.
    """
    obstacle = obstacle_to_concatenation(layers)
    if obstacle is not None:
        raise ValueError(f"the layers cannot be joined: {obstacle}")
    first = layers[0]
    joined = QuantLinear.empty(
        first.in_features,
        sum(layer.out_features for layer in layers),
        first.scheme,
        bias=first.bias is not None,
        dtype=first.dtype,
        device="meta",
    )
    for name, dimension in _OUTPUTS_OF.items():
        mine = getattr(first, name)
        if mine is not None:
            whole = torch.cat([getattr(layer, name) for layer in layers], dimension)
            stored = nn.Parameter(whole, mine.requires_grad) if name == "bias" else StoredPart(whole)
            setattr(joined, name, stored)
    if first.input_amax is not None:
        joined.input_amax = StoredPart(first.input_amax.clone())
    return joined.train(first.training)


class SharedInput:
    """The layers ``names`` of ``parent``, which are fed the same input, called as one: ``shared(x)`` is what each of
    them gives. No module, so that ``parent`` keeps its parameters under their names.

    Their parameters become views of the memory of one joined layer, so that nothing is stored twice and what is written
    to a layer is seen. Where they cannot be joined as they are (one has an adapter, or a hook that would not be called)
    and where gradients are wanted, they are called one by one. Layers that have moved since are joined again.
    """

    def __init__(self, parent: nn.Module, names: Sequence[str]) -> None:
        self._parent, self.names = parent, tuple(names)
        self._joined: QuantLinear | None = None
        self._where: tuple[int, ...] = ()

    def layers(self) -> list[nn.Module | None]:
        """As they are now."""
        return [getattr(self._parent, name, None) for name in self.names]

    def __call__(self, x: torch.Tensor | QuantizedInput) -> tuple[torch.Tensor, ...]:
        joined, layers = self.joined(), self.layers()
        if joined is not None and joined.qweight.device == x.device:
            return joined(x).split([layer.out_features for layer in layers], -1)
        return tuple(layer(x) for layer in layers)

    def joined(self) -> QuantLinear | None:
        """The layer that does what they do, as things are; None if they are to be called one by one."""
        layers = self.layers()
        if torch.is_grad_enabled() or not all(is_bare(layer) for layer in layers):
            return None
        return self._current(layers)

    def _current(self, layers: list[QuantLinear]) -> QuantLinear | None:
        # A compiler cannot ask where parameters are; layers say of themselves when they are moved or replaced.
        if not torch.compiler.is_compiling() and self._where != _where(layers):
            self._join(layers)
        return self._joined

    @torch.inference_mode(False)  # which parameters outlive
    @torch.no_grad()
    def _join(self, layers: list[QuantLinear]) -> None:
        self._joined, self._where = None, _where(layers)
        if obstacle_to_concatenation(layers) is not None:
            return  # and is not asked again before one of them moves
        joined = concatenated(layers)
        sizes = [layer.out_features for layer in layers]
        for name, dimension in _OUTPUTS_OF.items():
            if getattr(joined, name) is not None:
                for layer, part in zip(layers, getattr(joined, name).data.split(sizes, dimension), strict=True):
                    getattr(layer, name).data = part
        self._joined, self._where = joined, _where(layers)

    def join(self) -> bool:
        """Join the layers if they are not; whether they are."""
        layers = self.layers()
        for layer in layers:
            if isinstance(layer, QuantLinear):
                layer.shared_input = self
        return all(is_bare(layer) for layer in layers) and self._current(layers) is not None

    def forget(self) -> None:
        """A parameter was replaced: what was joined is no longer what is stored."""
        self._joined, self._where = None, ()

    @torch.no_grad()
    def part(self) -> None:
        """Give each layer memory of its own again."""
        if self._joined is not None:
            for layer in self.layers():
                if isinstance(layer, QuantLinear):
                    for name in _OUTPUTS_OF:
                        stored = getattr(layer, name)
                        if stored is not None:
                            stored.data = stored.data.clone(memory_format=torch.contiguous_format)
                    layer.shared_input = None
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_joined": None, "_where": ()}  # a copy's parameters are copies, each by itself


def is_bare(layer: nn.Module | None) -> bool:
    """Whether nothing but the layer's own product happens when it is called."""
    return (
        type(layer) is QuantLinear
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and "forward" not in vars(layer)
    )


def _where(layers: Sequence[QuantLinear]) -> tuple[int, ...]:
    """Addresses of all that they store: others when one is moved, cast or replaced."""
    stored = (layer._parameters.get(name) for layer in layers for name in _OUTPUTS_OF)
    return tuple(0 if one is None else one.data_ptr() for one in stored)
