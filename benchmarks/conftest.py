"""The machine that the pytest-benchmark suite runs on: a CUDA GPU, or nothing is measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from ditq_kernels.benchmark.provenance import gpu, provenance
from ditq_kernels.benchmark.timing import CudaStopwatch

NO_GPU = "no CUDA GPU on this machine: nothing to measure"


@pytest.fixture(scope="session")
def stopwatch() -> CudaStopwatch:
    """The stopwatch of the first GPU."""
    if not torch.cuda.is_available():
        pytest.skip(NO_GPU)
    return CudaStopwatch(torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def freed_memory() -> Iterator[None]:
    """One case's copies of its operands do not stay for the next."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["ditq"] = provenance()
    if torch.cuda.is_available():
        machine_info["gpu"] = gpu(torch.device("cuda", 0))
