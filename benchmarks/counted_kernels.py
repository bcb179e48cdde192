"""Which Triton kernels a GPU would compile for the tests, counted on a machine without one: a plugin for pytest. By
itself, those of smallest_cases.py.

    PYTHONPATH=benchmarks DITQ_COUNTED_ARCH=90 python -m pytest -p counted_kernels -m on_device
    DITQ_COUNTED_ARCH=90 python benchmarks/counted_kernels.py

A driver of Triton's stands in place of a GPU's. Every kernel that a test asks for is written down, by its code, types,
constants and options, and neither compiled nor launched. What a test would compare holds no results then, so that
comparisons are taken for passed; a test that ends early in spite of that is counted, and what it would have asked for
behind that point is not.
"""

from __future__ import annotations

import collections
import json
import os
import sys
import tempfile
from pathlib import Path

SMALLEST = ("passes", "gradients", "products_with_silu", "products")
ARCH = int(os.environ.get("DITQ_COUNTED_ARCH", "90"))
MULTIPROCESSORS = {80: 108, 90: 132, 120: 188}  # of an A100, an H100 and an RTX PRO 6000
os.environ.pop("TRITON_INTERPRET", None)
os.environ["DITQ_COUNTED_ARCH"] = str(ARCH)  # tests/conftest.py takes a GPU for granted

import pytest  # noqa: E402
import torch  # noqa: E402


class Counted:
    """Attributes:
    kernels: what was asked for, each with the kernel's name and the test file that asked first.
    asked: distinct kernels by test file, whoever asked first.
    early: tests that ended early.
    """

    def __init__(self) -> None:
        self.kernels: dict[tuple[str, str], tuple[str, str]] = {}
        self.asked: dict[str, set[tuple[str, str]]] = collections.defaultdict(set)
        self.early: list[str] = []
        self.tests = 0
        self.test = ""

    def note(self, *, fn, key, **_) -> bool:
        """Triton's hook before it compiles; True: do not."""
        name = fn.name
        identity = fn.jit_function.cache_key, str(key)
        self.kernels.setdefault(identity, (name, self.test))
        self.asked[self.test].add(identity)
        return True

    def report(self) -> dict:
        first = collections.Counter(test for _, test in self.kernels.values())
        return dict(
            arch=ARCH,
            kernels=len(self.kernels),
            tests=self.tests,
            ended_early=len(self.early),
            by_kernel=dict(collections.Counter(name for name, _ in self.kernels.values()).most_common()),
            by_test=dict(first.most_common()),
        )


counted = Counted()


def _without_results() -> None:
    """Comparisons pass, and references are not computed, which nothing is compared with."""
    import oracle

    from ditq_kernels.layer import error_budget, reference

    torch.equal = lambda a, b: True
    oracle.assert_product = oracle.assert_within_budget = lambda *arguments, **named: None
    error_budget.worst_share = error_budget.worst_share_of_codes = lambda *arguments, **named: 0.0
    reference.dequantize = lambda weight: torch.empty(1, 1, device="meta")
    for name in ("linear_a8", "linear_a16", "grad_input"):
        setattr(reference, name, lambda x, *arguments, **named: torch.empty(1, device="meta"))


def _install() -> None:
    import triton

    from ditq_kernels.inspect.executor import driver
    from ditq_kernels.kernels.config import shared_memory

    driver.install(driver.Session(ARCH, shared_memory(ARCH)), tempfile.gettempdir())
    triton.knobs.runtime.jit_cache_hook = counted.note


def _standing_in():
    from ditq_kernels.kernels.device import Device, standing_in

    return standing_in(Device("counted", ARCH, MULTIPROCESSORS.get(ARCH, 108)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session):
    _install()
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    _without_results()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    counted.test = item.nodeid.split("[")[0].split("/")[-1]
    with _standing_in():
        return (yield)


def pytest_runtest_logreport(report):
    if report.when == "call":
        counted.tests += 1
        if report.failed:
            counted.early.append(report.nodeid)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(json.dumps(counted.report()))


def main() -> None:
    """Of smallest_cases.py: its calls are made, and what they give is not looked at."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import smallest_cases

    _install()
    smallest_cases._compare = lambda call, checked: call()
    device = torch.device("cpu")
    with _standing_in():
        for source in (getattr(smallest_cases, name) for name in SMALLEST):
            counted.test = f"{source.__name__}"
            for _, run in source(device):
                counted.tests += 1
                try:
                    run()
                except AssertionError:  # the passes compare by themselves
                    continue
    print(json.dumps(counted.report()))


if __name__ == "__main__":
    main()
