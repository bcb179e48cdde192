"""Operations of PyTorch and of ours as kernels: what each touches and multiplies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from . import work
from .absent_gpu import ATTENTION
from .launches import launched
from .tensors import is_view, memory_of, role_of, size_of, tensors_in
from .work import PASS, PRODUCT, WIDE, Work


def touched(reads: list[torch.Tensor], writes: list[torch.Tensor], weights: set[int]) -> tuple[tuple[str, int], ...]:
    """What :attr:`.work.Work.touched` says of tensors that are read, each once, and written."""
    once = list({(memory_of(one), one.storage_offset(), one.shape): one for one in reads}.values())
    return tuple((role_of(one, weights), size_of(one)) for one in (*once, *writes))


def macs_of(function: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> int:
    """Multiply-accumulates of a product of PyTorch's, or of attention; 0 of all else."""
    if function is ATTENTION:
        query, key, value = args[:3]
        batch, heads, rows, width = query.shape
        return batch * heads * rows * key.shape[-2] * (width + value.shape[-1])
    count = flop_registry.get(function.overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=result) // 2


def kind_of(function: Any, macs: int) -> str:
    return work.ATTENTION if function is ATTENTION else PRODUCT if macs else PASS


def kernels_of(function: Any, args: tuple, kwargs: Mapping[str, Any], result: Any, weights: set[int]) -> Iterator[Work]:
    """Of an operation on fake tensors; of ours, as many as are launched.

    Args:
        weights: what :func:`memory_of` says of the model's weights.
    """
    if function.namespace == "ditq":
        yield from launched(function, args, weights)
    elif not is_view(function, (args, kwargs), result):
        macs = macs_of(function, args, kwargs, result)
        name = function.overloadpacket.__name__
        sizes = touched(tensors_in((args, kwargs)), tensors_in(result), weights)
        yield Work(name, kind_of(function, macs), sizes, {WIDE: macs} if macs else {})
