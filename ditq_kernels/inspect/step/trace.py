"""A step of a model, block by block."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...published import MODELS
from .absent_gpu import absent_gpu, place, placed
from .compiled import scheduled
from .eager import dispatched
from .quantized import put_empty_layers
from .tensors import memory_of
from .work import Work

PLAIN = "16 bits"


@dataclass(frozen=True)
class Form:
    """How a model runs.

    Attributes:
        scheme: that it is quantized in; None: 16 bits.
        fused: by ``ditq.fuse``.
        compiled: its blocks by ``torch.compile``; the rest is as in eager.
    """

    scheme: str | None = None
    fused: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        what = PLAIN if self.scheme is None else self.scheme + (", fused" if self.fused else "")
        return what + (", compiled" if self.compiled else "")


BUILT = 3  # blocks of each kind: the first is fed otherwise than those behind it, and the last may be another


@dataclass(frozen=True)
class Step:
    """Kernels of one call of a model with :data:`BUILT` blocks of each kind.

    Attributes:
        blocks: of each block, by the name of the list that it is in.
        rest: of all else.
    """

    blocks: dict[str, list[list[Work]]]
    rest: list[Work]

    def block(self, name: str) -> list[Work]:
        """Of one in the middle of the list."""
        return self.blocks[name][1]


def trace(name: str, form: Form, arch: int) -> Step:
    """One call of the model ``name`` of :data:`ditq_kernels.published.MODELS`, in a process with
    :func:`.launches.installed`.
    """
    from ...model.pipelines import fuse

    published = MODELS[name]
    model = published.build(BUILT)
    if form.scheme is not None:
        put_empty_layers(model, form.scheme)
    with absent_gpu(arch) as mode:
        place(model, mode)
        inputs = placed(published.inputs(), mode)
        if form.fused:
            fuse(model)
        given = _given(model, published.depths, inputs)
        weights = {memory_of(one) for one in model.parameters()}  # joined ones share theirs with what is joined
        rest = dispatched(lambda: model(**inputs), weights)
        found: dict[str, list[list[Work]]] = {}
        for block, arguments in given.items():
            alone = dispatched(lambda block=block, arguments=arguments: block(**arguments), weights)
            for kernel in alone:
                rest.remove(kernel)
            found.setdefault(_list_of(model, block), []).append(
                scheduled(block, arguments, arch) if form.compiled else alone
            )
    return Step(found, rest)


def _list_of(model: nn.Module, block: nn.Module) -> str:
    return next(name for name, child in model.named_children() if block in list(child.children()))


def _given(model: nn.Module, lists: Iterable[str], inputs: dict[str, Any]) -> dict[nn.Module, dict[str, Any]]:
    """What the blocks in ``lists`` are called with."""
    given: dict[nn.Module, dict[str, Any]] = {}

    def note(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given[block] = inspect.signature(block.forward).bind(*args, **kwargs).arguments

    with contextlib.ExitStack() as hooks:
        for block in (block for name in lists for block in getattr(model, name)):
            hooks.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        model(**inputs)
    return given
