"""The weight of a quantized layer, for code that expects a tensor: it knows its shape, is decoded where it is read, and
nothing that writes to it is lost in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from .errors import UnsupportedError
from .formats import Scheme

_READ_ONLY = (
    "the weight of a layer quantized to {scheme} is decoded for reading and cannot be written to: change the model "
    "before it is quantized, or write to .weight.data, which quantizes the layer again"
)
_NO_GRADIENT = "the weight of a layer quantized to {scheme} takes no gradient: train an adapter (LoRA) over it"


class Layer(Protocol):
    """What a view asks of its layer, a :class:`ditq_kernels.layer.linear.QuantLinear`."""

    in_features: int
    out_features: int
    dtype: torch.dtype
    scheme: Scheme
    qweight: torch.Tensor

    def dequantized_weight(self) -> torch.Tensor: ...

    def requantize(self, weight: torch.Tensor) -> None: ...


class WeightView(torch.Tensor):
    """[N, K] in the layer's dtype, on its device, or a view of that. Every operation decodes the stored weight anew.

    What writes to it raises. What writes to its ``.data``, as libraries that merge adapters do, quantizes the layer
    again: see :meth:`ditq_kernels.layer.linear.QuantLinear.requantize`. Compiled code reads a plain tensor instead, to
    which it would write in vain.
    """

    _layer: Layer
    _writes: bool  # whether to ``.data``
    _path: tuple[Callable, ...]  # the views that lead from the whole weight to this one
    _is_hf_initialized = True  # transformers' loaders ask it of each weight, and write into those that say no

    @staticmethod
    def __new__(cls, layer: Layer, writes: bool = False, path: tuple[Callable, ...] = ()) -> WeightView:
        shape = torch.empty(layer.out_features, layer.in_features, dtype=layer.dtype, device="meta")
        for step in path:
            shape = step(shape)
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            shape.shape,
            strides=shape.stride(),
            storage_offset=shape.storage_offset(),
            dtype=layer.dtype,
            device=layer.qweight.device,
        )
        self._layer, self._writes, self._path = layer, writes, path
        return self

    def decoded(self) -> torch.Tensor:
        """A plain tensor of the same values."""
        return self._seen_in(self._layer.dequantized_weight().to(self._layer.dtype))

    def _seen_in(self, whole: torch.Tensor) -> torch.Tensor:
        return functools.reduce(lambda seen, step: step(seen), self._path, whole)

    def _write(self, change: Callable[[torch.Tensor], Any]) -> None:
        """``change`` a plain tensor of these values in place, and quantize the layer again as that leaves it."""
        _write_all([self], lambda seen: change(*seen))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        view = args[0] if args else None
        if isinstance(view, WeightView):  # these never become dispatched operations
            if func == torch.Tensor.data.__get__:
                return WeightView(view._layer, True, view._path)
            if func == torch.Tensor.data.__set__:
                return view._assign(args[1])
            if func == torch.Tensor.__setitem__:
                return view._write(lambda seen: seen.__setitem__(*args[1:]))
            if func in (torch.Tensor.numpy, torch.Tensor.tolist):
                values = func(view.decoded(), *args[1:], **(kwargs or {}))
                if func == torch.Tensor.numpy:
                    values.setflags(write=False)  # no write would come back
                return values
            if func in (torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__):
                if (*args[1:], *(kwargs or {}).values(), True)[0]:
                    raise UnsupportedError(_NO_GRADIENT.format(scheme=view._layer.scheme))
                return view
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def _assign(self, value: torch.Tensor) -> None:
        if isinstance(value, WeightView) and value._layer is self._layer and value._path == self._path:
            return  # the end of ``weight.data += x``, which has written already
        if value.shape != self.shape:
            raise ValueError(f"a weight of {list(self.shape)} cannot become one of {list(value.shape)}")
        self._layer.requantize(value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        given = dict(zip([argument.name for argument in schema.arguments], args, strict=False)) | kwargs
        aliased = [argument for argument in schema.arguments if argument.alias_info is not None]
        written = [given.get(argument.name) for argument in aliased if argument.alias_info.is_write]
        if not written and aliased and isinstance(args[0], WeightView):
            return _views(args[0], lambda x: func(x, *args[1:], **kwargs))
        targets = [one for one in pytree.tree_leaves(written) if isinstance(one, WeightView)]

        def run(seen: list[torch.Tensor]) -> Any:
            def plain(value: Any) -> Any:
                place = next((place for place, target in enumerate(targets) if target is value), None)
                return value.decoded() if place is None else seen[place]

            return func(
                *pytree.tree_map_only(WeightView, plain, args), **pytree.tree_map_only(WeightView, plain, kwargs)
            )

        if not targets:
            return run([])
        _write_all(targets, run)
        return (written[0] if len(written) == 1 else tuple(written)) if schema.returns else None

    def __repr__(self, **_: Any) -> str:
        return f"WeightView({self.decoded()!r}, scheme={self._layer.scheme})"

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        return self.decoded()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.decoded().__reduce_ex__(protocol)


def _write_all(views: Sequence[WeightView], change: Callable[[list[torch.Tensor]], Any]) -> None:
    """``change`` plain tensors of the values of ``views`` in place, and quantize their layers again as that leaves
    them.
    """
    for view in views:
        if not view._writes:
            raise UnsupportedError(_READ_ONLY.format(scheme=view._layer.scheme))
    layers = {id(view._layer): view._layer for view in views}
    wholes = {name: layer.dequantized_weight().to(layer.dtype) for name, layer in layers.items()}
    change([view._seen_in(wholes[id(view._layer)]) for view in views])
    for name, layer in layers.items():
        layer.requantize(wholes[name])


def _views(view: WeightView, step: Callable) -> WeightView | list[WeightView]:
    """What a further ``step`` sees of ``view``; of one that gives several tensors, each."""
    seen = step(view._seen_in(torch.empty(view._layer.out_features, view._layer.in_features, device="meta")))
    if isinstance(seen, torch.Tensor):
        return WeightView(view._layer, view._writes, (*view._path, step))
    return [
        WeightView(view._layer, view._writes, (*view._path, lambda x, place=place: step(x)[place]))
        for place in range(len(seen))
    ]
