"""Without a CUDA GPU the kernels run in Triton's interpreter; that has to be settled before Triton defines the first of
them.
"""

import ast
import functools
import importlib.util
import os
import zlib
from pathlib import Path

# Processes that test side by side share the cores, and so do those that they start; PyTorch reads this once.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))

import pytest  # noqa: E402
import torch  # noqa: E402

# benchmarks/counted_kernels.py writes down what tests would compile on a GPU: they take one for granted, and the CPU
# stands in for it.
COUNTED = "DITQ_COUNTED_ARCH" in os.environ
HAS_GPU = torch.cuda.is_available() or COUNTED
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        import leaner_interpreter

        leaner_interpreter.install()


TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent


@functools.cache
def file_of(module: str) -> Path | None:
    """Of a module of this repository: of the package, or a helper of the tests; None for any other name."""
    relative = Path(*module.split("."))
    ends = relative.with_suffix(".py"), relative / "__init__.py"
    return next((base / end for base in (REPOSITORY, TESTS) for end in ends if (base / end).exists()), None)


@functools.cache
def imported_at_the_top(path: Path) -> frozenset[str]:
    """Modules, and what may be modules, that a file imports whenever it is imported, and the packages they are in."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(REPOSITORY).parent.parts
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return frozenset(".".join(name.split(".")[: end + 1]) for name in names for end in range(name.count(".") + 1))


def missing_packages(test: Path) -> set[str]:
    """What this Python lacks of all that a test file imports at its top, itself or through this repository's files."""
    missing, seen, left = set(), {test}, [test]
    while left:
        for module in imported_at_the_top(left.pop()):
            path = file_of(module)
            if path is not None and path not in seen:
                seen.add(path)
                left.append(path)
            top = module.split(".")[0]
            if file_of(top) is None and importlib.util.find_spec(top) is None:
                missing.add(top)
    return missing


# A machine that was prepared to run kernels, and nothing else, runs the tests of the kernels.
LEFT_OUT = {path.name: missing for path in TESTS.glob("test_*.py") if (missing := missing_packages(path))}
collect_ignore = list(LEFT_OUT)


def pytest_report_header():
    return [
        f"left out, not installed: {name} ({', '.join(sorted(missing))})" for name, missing in sorted(LEFT_OUT.items())
    ]


# Files of minutes come first, so that none is left to one process in the end; of these, every second keeps all cores
# busy by itself.
LONGEST = (
    *("execution", "every_pipeline", "kernels", "inspection", "routes", "every_model", "taken_away", "planted_faults"),
    *("emulated_kernels", "cli"),
)


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))
    part, parts = map(int, os.environ.get("DITQ_TESTS_PART", "0/1").split("/"))
    items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts == part]
    skip = pytest.mark.skip(reason="no CUDA GPU on this machine")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(skip)
        if "gpu" in item.keywords or "device" in getattr(item, "fixturenames", ()):
            item.add_marker("on_device")


@pytest.fixture(scope="module")
def one_thread():
    """Products as small as a test's take longer where threads share them, and how they do shows in the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device():
    """Where kernels run: the GPU if there is one, else the CPU, interpreted."""
    return torch.device("cuda" if HAS_GPU and not COUNTED else "cpu")


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator of its own is the same in every run, and shifts with DITQ_TEST_SEED."""
    from oracle import TEST_SEED

    torch.manual_seed(TEST_SEED)


@pytest.fixture
def poisoned_memory():
    """Fresh tensors hold NaN, or the largest integer, so that an element that a kernel forgets is seen."""
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.set_deterministic_debug_mode(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
