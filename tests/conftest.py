"""Without a CUDA GPU the kernels run in Triton's interpreter; that has to be settled before Triton defines the first of
them.
"""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="no CUDA GPU on this machine")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(skip)


@pytest.fixture
def device():
    """Where kernels run: the GPU if there is one, else the CPU, interpreted."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def poisoned_memory():
    """Fresh tensors hold NaN, or the largest integer, so that an element that a kernel forgets is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
