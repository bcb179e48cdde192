"""Small real kernels, compiled and then executed from PTX that a test has changed; run in a process of its own, because
pytest's interprets kernels and does not compile them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch

from ditq_kernels.inspect import execution
from ditq_kernels.inspect.cases import passes, products
from ditq_kernels.inspect.cases.case import Case
from ditq_kernels.kernels.config import Config, shared_memory
from ditq_kernels.layer.formats import WEIGHT_FORMATS

BF16 = torch.bfloat16
INPUTS = 640  # five steps of 128: more than a pipeline is deep, so that stages are used again


def in_a_compiling_process(script: str, *arguments: str):
    """What ``script`` prints, read as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def smallest(fmt: str, activation_bytes: int, route: str, arch: int, descriptors: bool = False) -> Config:
    """The smallest tile of a route."""
    known = products.selectable(WEIGHT_FORMATS[fmt], activation_bytes, 2, arch)
    tiled = [c for c in known if c.route == route and c.block_m and c.descriptors == descriptors]
    return min(tiled, key=lambda c: (c.block_m * c.block_n, c.num_warps))


def product(fmt: str, kind: torch.dtype, config: Config, shape: tuple[int, int, int], arch: int) -> Callable[[], str]:
    arguments = WEIGHT_FORMATS[fmt], shape, config, BF16, True
    if kind == torch.int8:
        return functools.partial(products.product_a8, *arguments)
    return functools.partial(products.product_a16, *arguments, arch)


def gradient(fmt: str, shape: tuple[int, int, int], arch: int) -> Callable[[], str]:
    return functools.partial(passes.grad_input, WEIGHT_FORMATS[fmt], shape, BF16, arch)


@contextlib.contextmanager
def executing(arch: int) -> Iterator[object]:
    """A session whose driver is installed."""
    from ditq_kernels.inspect.executor import driver

    execution.prepare_process()
    session = driver.Session(arch, shared_memory(arch))
    with tempfile.TemporaryDirectory() as cache:
        driver.install(session, cache)
        yield session


def verdict(session, compute: Callable[[], str], change: Callable[[str], str] | None = None) -> tuple[str, str]:
    """(verdict, what is said) of a computation whose PTX was changed."""
    session.change = change
    outcome = execution.run_case(Case("changed", "changed", compute), session)
    session.change = None
    return outcome.verdict, outcome.said


def text_of(session, compute: Callable[[], str]) -> str:
    """The PTX of a computation of one launch, which is right as it is."""
    found = verdict(session, compute)
    assert found[0] == execution.OK, found
    (launch,) = session.launches
    return launch.text
