"""What the choice of a configuration has to know of a device, asked once per device."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .config import SHARED_MEMORY

INTERPRETED_MULTIPROCESSORS = 4  # of the CPU, where kernels are interpreted: few, so that persistent programs loop


@dataclass(frozen=True)
class Device:
    """Attributes:
    name: as the driver gives it, such as "NVIDIA H100 80GB HBM3"; the key of a measured table.
    capability: 10 * major + minor.
    multiprocessors: how many of them.
    """

    name: str
    capability: int
    multiprocessors: int


_NOTHING_TO_DO = contextlib.nullcontext()
# What a CPU passes for: where kernels are interpreted, a device of the smallest supported capability.
_CPU = Device("CPU", min(SHARED_MEMORY), INTERPRETED_MULTIPROCESSORS)
_cpu: contextvars.ContextVar[Device] = contextvars.ContextVar("ditq_cpu", default=_CPU)


@contextlib.contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """Within the ``with`` block the CPU passes for ``device``: how kernels compiled for a GPU are chosen without it."""
    token = _cpu.set(device)
    try:
        yield
    finally:
        _cpu.reset(token)


@functools.cache
def _describe_cuda(device: torch.device) -> Device:
    found = torch.cuda.get_device_properties(device)
    return Device(found.name, 10 * found.major + found.minor, found.multi_processor_count)


def describe(device: torch.device) -> Device:
    """The CUDA device, or what the CPU passes for."""
    return _describe_cuda(device) if device.type == "cuda" else _cpu.get()


def launch_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's CUDA device the current one, which is where Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _NOTHING_TO_DO
    return torch.cuda.device(tensor.device)
