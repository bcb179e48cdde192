"""Without a CUDA GPU the kernels run in Triton's interpreter; that has to be settled before Triton defines the first of
them.
"""

import ast
import importlib.util
import os
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def missing_packages(path: Path) -> list[str]:
    """What a test file imports at its top and this Python lacks."""
    tree = ast.parse(path.read_text())
    names = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    tops = {name.split(".")[0] for name in names}
    return sorted(name for name in tops if importlib.util.find_spec(name) is None)


# A machine that was prepared to run kernels, and nothing else, runs the tests of the kernels.
LEFT_OUT = {
    path.name: missing for path in Path(__file__).parent.glob("test_*.py") if (missing := missing_packages(path))
}
collect_ignore = list(LEFT_OUT)


def pytest_report_header():
    return [f"left out, not installed: {name} ({', '.join(missing)})" for name, missing in sorted(LEFT_OUT.items())]


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="no CUDA GPU on this machine")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(skip)
        if "gpu" in item.keywords or "device" in getattr(item, "fixturenames", ()):
            item.add_marker("on_device")


@pytest.fixture
def device():
    """Where kernels run: the GPU if there is one, else the CPU, interpreted."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own is the same in every run, and shifts with DITQ_TEST_SEED."""
    from oracle import TEST_SEED

    torch.manual_seed(TEST_SEED)


@pytest.fixture
def poisoned_memory():
    """Fresh tensors hold NaN, or the largest integer, so that an element that a kernel forgets is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
