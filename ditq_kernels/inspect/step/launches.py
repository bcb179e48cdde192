"""Our ops as they are launched: each is called as on a GPU, with tensors that have no contents, and what Triton's
driver would be given is written down.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...kernels.config import shared_memory
from ...layer import backend, contracts
from ..executor import driver
from .tensors import is_view, memory_of, role_of, size_of, tensors_in
from .work import ACTIVATION, INT8, PASS, PRODUCT, SCRATCH, WEIGHT, WIDE, Work

PRODUCTS = {"linear_a8": INT8, "linear_a16": WIDE}  # by what they multiply


class _Launches:
    """Of the op that runs now: (name, tensors that are touched)."""

    def __init__(self) -> None:
        self.found: list[tuple[str, list[torch.Tensor]]] = []

    def add(self, name: str, tensors: list[torch.Tensor]) -> None:
        once = {(memory_of(one), one.storage_offset(), one.shape): one for one in tensors}
        self.found.append((name, list(once.values())))


_launches = _Launches()


class _Launcher(driver.Launcher):
    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        given = (getattr(one, "base", one) for one in arguments)  # of descriptors
        _launches.add(self.metadata.name, [one for one in given if isinstance(one, torch.Tensor)])


class _Dispatched(TorchDispatchMode):
    """What PyTorch computes for an op of ours, beside kernels of our own."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not is_view(function, (args, kwargs), result):
            _launches.add(function.overloadpacket.__name__, tensors_in((args, kwargs, result)))
        return result


@contextlib.contextmanager
def installed(arch: int) -> Iterator[None]:
    """Within the ``with`` block, Triton compiles for ``arch`` and launches nothing; once in a process."""
    with (
        tempfile.TemporaryDirectory() as cache,
        patch.object(driver, "Launcher", _Launcher),
        patch.object(backend, "why_unavailable", lambda name, device_type: None),
        backend.use_backend("triton"),
    ):
        driver.install(driver.Session(arch, shared_memory(arch)), cache)
        yield


def launched(function: Any, args: tuple, weights: set[int]) -> Iterator[Work]:
    """The kernels of our op ``function``, within :func:`installed`."""
    name = function.overloadpacket.__name__
    here: dict[int, torch.Tensor] = {}

    def on_cpu(one: torch.Tensor) -> torch.Tensor:
        made = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cpu")
        here[memory_of(made)] = one
        return made

    arguments = torch.utils._pytree.tree_map_only(torch.Tensor, on_cpu, args)
    _launches.found = []
    with _Dispatched():
        result = contracts.IMPLEMENTATIONS[name](*arguments)
    multiplied = {} if name not in PRODUCTS else {PRODUCTS[name]: arguments[0].numel() * result.shape[1]}
    roles = {memory: role_of(one, weights) for memory, one in here.items()}
    for kernel, tensors in _launches.found:
        given = {roles[memory_of(one)] for one in tensors if memory_of(one) in roles}
        for one in tensors:  # what is made of weights alone is a weight, decoded
            roles.setdefault(memory_of(one), SCRATCH if given == {WEIGHT} else ACTIVATION)
        sizes = tuple((roles[memory_of(one)], size_of(one)) for one in tensors)
        weighs = bool({roles[memory_of(one)] for one in tensors} & {WEIGHT, SCRATCH})
        made = (one for one in tensors if memory_of(one) not in here and roles[memory_of(one)] != SCRATCH)
        macs = {}
        if multiplied and weighs and (written := sum(one.numel() for one in made)):  # of stretches, each its share
            macs = {kind: number * written // result.numel() for kind, number in multiplied.items()}
        yield Work(kernel, PRODUCT if multiplied and weighs else PASS, sizes, macs)
