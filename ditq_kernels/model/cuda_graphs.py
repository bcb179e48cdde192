"""A model's calls as CUDA graphs: captured once for each kind of input, and replayed, so that the host launches one
thing where it launched hundreds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..layer.shared_input import has_hooks
from .substituted_class import Forward, restore, substitute

WARM_UP = 3  # calls before a capture: what is compiled, chosen or allocated once is then done
MOST_GRAPHS = 4  # of a model; each has memory of its own
_GRAPHS = "_ditq_graphs"  # where a model keeps them


def graph(model: nn.Module) -> None:
    """See :func:`ditq_kernels.model.pipelines.graph`."""
    if _GRAPHS not in vars(model):
        vars(model)[_GRAPHS] = _Graphs()
        substitute(model, _replaying)


def ungraph(model: nn.Module) -> None:
    """Undo :func:`graph`, and give the memory of the graphs back."""
    if vars(model).pop(_GRAPHS, None) is not None:
        restore(model)


@dataclass
class _Captured:
    """Attributes:
    replay: computes ``result`` of ``inputs``.
    inputs: tensors that the graph reads.
    result: what the model returned, whose tensors the graph writes.
    where: what the model was made of, as :func:`_where` says.
    """

    replay: Callable[[], None]
    inputs: list[torch.Tensor]
    result: Any
    where: list[Any]


class _Graphs:
    """Of one model, by what its inputs are like; those that were used last are kept."""

    def __init__(self) -> None:
        self.captured: OrderedDict[Any, _Captured] = OrderedDict()

    def __deepcopy__(self, memo: dict) -> _Graphs:
        return _Graphs()  # a copy's weights are elsewhere

    def __reduce__(self) -> tuple:
        return _Graphs, ()


def _replaying(original: Forward) -> Forward:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graphs = self.__dict__.get(_GRAPHS)
        leaves, form = pytree.tree_flatten((args, kwargs))
        tensors = [one for one in leaves if isinstance(one, torch.Tensor)]
        if graphs is None or not _may_replay(tensors):
            return original(self, *args, **kwargs)
        kinds = tuple(_kind(one) for one in leaves)
        try:
            found = graphs.captured.get((form, kinds))
        except TypeError:  # an argument that cannot be looked up
            return original(self, *args, **kwargs)
        where = _where(self)
        if where is None:
            return original(self, *args, **kwargs)
        if found is None or found.where != where:
            graphs.captured.pop((form, kinds), None)
            while len(graphs.captured) >= MOST_GRAPHS:
                graphs.captured.popitem(last=False)
            found = graphs.captured[form, kinds] = _capture(self, original, leaves, form, where)
        graphs.captured.move_to_end((form, kinds))
        for static, one in zip(found.inputs, tensors, strict=True):
            static.copy_(one)
        found.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, found.result)  # the next replay writes these again

    return forward


def _may_replay(tensors: list[torch.Tensor]) -> bool:
    return (
        bool(tensors)
        and all(one.is_cuda for one in tensors)
        and not torch.is_grad_enabled()
        and not torch._C._is_any_autocast_enabled()
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def _where(model: nn.Module) -> list[Any] | None:
    """Which parameters and buffers ``model`` has, and where they lie; None if something hangs on a module that would
    not be called by a replay.
    """
    found: list[Any] = []
    for module in model.modules():
        if module is not model and has_hooks(module):
            return None
        for one in (*module._parameters.values(), *module._buffers.values()):
            if one is not None:
                found += (id(one), one.data_ptr())
    return found


def _capture(model: nn.Module, original: Forward, leaves: list[Any], form: Any, where: list[Any]) -> _Captured:
    inputs = [one.clone() for one in leaves if isinstance(one, torch.Tensor)]
    given = iter(inputs)
    args, kwargs = pytree.tree_unflatten(
        [next(given) if isinstance(one, torch.Tensor) else one for one in leaves], form
    )
    replay, result = captured(lambda: original(model, *args, **kwargs), inputs[0].device)
    return _Captured(replay, inputs, result, where)


def captured(call: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
    """(a CUDA graph of ``call`` to replay, what the call returned, which replays write again), captured after
    :data:`WARM_UP` calls.
    """
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    current.wait_stream(side)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        result = call()
    return made.replay, result
