"""What is installed on this machine, and which backends work here: ``ditq env``."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
from collections.abc import Iterator

import torch

from . import __version__
from .arguments import AddCommand
from .layer import cpu_extension, extension
from .layer.backend import BACKENDS, why_unavailable

PACKAGES = ("torch", "triton", "diffusers", "safetensors", "accelerate", "torchmetrics")


def describe() -> Iterator[str]:
    """Lines to print: versions, compiler, extension, GPUs, and each backend, with a reason where it does not work."""
    yield f"ditq_kernels {__version__}, Python {platform.python_version()}, {platform.platform()}"
    for package in PACKAGES:
        try:
            yield f"  {package:12} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"  {package:12} not installed"
    yield f"  {'nvcc':12} {shutil.which('nvcc') or 'not found'}"
    yield f"  {'extension':12} {extension.why_unavailable() or 'built, and loads'}"
    yield f"  {'for CPUs':12} {cpu_extension.why_unavailable() or _cpu_levels()}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            yield f"  GPU {index}        {torch.cuda.get_device_name(index)}, sm_{major}{minor}"
    else:
        yield "  GPU          none that torch can use"
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for kind in kinds:
        for backend in BACKENDS:
            reason = why_unavailable(backend, kind)
            yield f"backend {backend:9} for {kind:4} tensors: {'works' if reason is None else 'no: ' + reason}"


def _cpu_levels() -> str:
    multiplies = cpu_extension.why_no_products() or f"{cpu_extension.product_levels()[-1]} instructions multiply"
    return f"built, and loads: {cpu_extension.weight_levels()[-1]} instructions round weights, {multiplies}"


def _print(args: argparse.Namespace) -> int:
    print("\n".join(describe()))
    return 0


def add_commands(command: AddCommand) -> None:
    """Add ``ditq env`` by ``command(name, run, help, examples)``."""
    command(
        "env",
        _print,
        "say what is installed and which backends work here, and why not",
        "  ditq env",
        device=False,
    )
