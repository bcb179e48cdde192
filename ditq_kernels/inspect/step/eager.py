"""Kernels of a call as PyTorch runs it: an operation that computes is one, and ours are as many as are launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from .operations import kernels_of
from .work import Work


class _Recorder(TorchDispatchMode):
    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.kernels: list[Work] = []
        self._weights = weights

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.kernels += kernels_of(function, args, kwargs, result, self._weights)
        return result


def dispatched(call: Callable[[], object], weights: set[int]) -> list[Work]:
    """What ``call`` launches, within :func:`.absent_gpu.absent_gpu`."""
    with _Recorder(weights) as recorder:
        call()
    return recorder.kernels
