"""Which backend serves an op: asked for, or by the tensors' device. A backend is a module with a function per op."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from . import cpu_extension, extension, reference
from .errors import UnsupportedError

BACKENDS = ("reference", "cpu", "triton", "cuda")
_OWN_BACKEND = {"cpu": "cpu", "cuda": "triton"}  # by the tensors' device
BACKEND_VARIABLE = "DITQ_BACKEND"
_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("ditq_backend", default=None)


def _known_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; allowed: {', '.join(BACKENDS)}")
    return name


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """``with use_backend(name):`` every op within the block runs on backend ``name``, one of :data:`BACKENDS`.

    Raises:
        ValueError: for an unknown name.
    """
    return _used(_known_backend(name))


@contextlib.contextmanager
def _used(name: str) -> Iterator[None]:
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, which is how CPU tensors can use them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_unavailable(backend: str, device_type: str) -> str | None:
    """None if ``backend`` can serve tensors on ``device_type``, else the reason in one clause, with the way out."""
    if backend == "reference":
        return None
    if backend == "cpu":
        if device_type != "cpu":
            return f"it takes CPU tensors, and these are {device_type}; use triton or reference"
        return cpu_extension.why_no_products()
    if backend == "cuda":
        reason = extension.why_unavailable()
        if reason is None and device_type != "cuda":
            reason = f"the CUDA extension takes CUDA tensors, and these are {device_type}; use reference"
        if reason or interpreting():
            return reason or "TRITON_INTERPRET=1 keeps the Triton kernels, which it works with, from the GPU"
    if not _triton_is_installed():
        return "triton is not installed; pip install triton, or use reference"
    if device_type == "cuda" and not interpreting():
        return None
    if device_type == "cpu" and interpreting():
        return None
    return (
        "triton kernels need CUDA tensors, or CPU tensors with TRITON_INTERPRET=1 set before they are first used, "
        f"and these are {device_type}; use reference"
    )


def asked_backend() -> str | None:
    """By :func:`use_backend` or ``DITQ_BACKEND``; None: nobody asks for one."""
    return _chosen.get() or os.environ.get(BACKEND_VARIABLE)


def selected_backend(device_type: str) -> str:
    """The backend for tensors on ``device_type``: :func:`use_backend`'s, else ``DITQ_BACKEND``'s, else triton for CUDA
    tensors, cpu for CPU tensors where that is possible, and reference.

    Raises:
        UnsupportedError: if the backend asked for cannot serve the device.
        ValueError: if ``DITQ_BACKEND`` holds an unknown name.
    """
    asked = asked_backend()
    if asked is None:
        own = _OWN_BACKEND.get(device_type, "reference")
        return own if why_unavailable(own, device_type) is None else "reference"
    reason = why_unavailable(_known_backend(asked), device_type)
    if reason:
        raise UnsupportedError(f"backend {asked!r} cannot serve {device_type} tensors: {reason}")
    return asked


def backend_of(device: torch.device) -> ModuleType:
    """The module that implements the ops for tensors on ``device``; kernels are imported on first use."""
    backend = selected_backend(device.type)
    if backend == "reference":
        return reference
    if backend == "cpu":
        from . import cpu

        return cpu
    if backend == "cuda":
        from ..kernels import cuda

        return cuda
    from .. import kernels

    return kernels
