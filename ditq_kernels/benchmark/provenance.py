"""Where and with what a number was measured. A number without this is worth nothing to a reader."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..layer import cpu_extension
from ..revision import commit, output_of
from .peers import versions as peer_versions


def gpu(device: torch.device) -> dict[str, Any]:
    """Name, capability, multiprocessors, memory and cache of a CUDA device, and its driver."""
    found = torch.cuda.get_device_properties(device)
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}")
    return dict(
        name=found.name,
        capability=f"{found.major}.{found.minor}",
        multiprocessors=found.multi_processor_count,
        memory_bytes=found.total_memory,
        l2_bytes=found.L2_cache_size,
        driver=driver,
    )


def cpu() -> dict[str, Any]:
    """Name and cores of this machine's CPU, and what of it PyTorch uses and our int8 products."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return dict(
        name=names[0].strip() if names else platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        products=cpu_extension.why_no_products() or cpu_extension.product_levels()[-1],
    )


def provenance() -> dict[str, Any]:
    """Versions, commit and date, as JSON."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return dict(
        ditq_kernels=__version__,
        commit=commit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=triton,
        peers=peer_versions(),
    )
