"""Candidates compiled ahead, in several processes: Triton compiles one kernel at a time, and a sweep has many.

Each process runs its share of the candidates once, which leaves them in Triton's cache on disk. One that takes its
process, or the GPU's context, down with it is named, so that the sweep itself never meets it.

    python -m ditq_kernels.benchmark.ahead SHARE SHARES DEVICE all|quick MODEL...      (started by `ditq tune`)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from .cases import select
from .contenders import Inputs
from .run import one_line
from .tune import Task, operands_of, product_with, tasks

if TYPE_CHECKING:
    from ..kernels.config import Config

MOST_PROCESSES = 8
STARTED, DONE, FAILED = "started", "done", "failed"


def processes() -> int:
    """How many are worth starting here."""
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) // 2))


def distinct(wanted: Sequence[Task], device: torch.device) -> list[tuple[Task, Config]]:
    """One task for each kernel: a candidate of one family compiles to the same code for every shape whose sides are
    multiples of 128.
    """
    from ..kernels.config import Problem, candidates, row_class
    from ..kernels.device import describe

    described = describe(device)
    found: dict[tuple, tuple[Task, Config]] = {}
    for task in wanted:
        case = task.case
        problem = Problem(
            row_class(case.rows),
            case.out_features,
            case.in_features,
            task.activation_bytes,
            task.fmt,
            described.capability,
            described.multiprocessors,
        )
        for config in candidates(problem):
            found.setdefault((task.fmt, task.activation_bytes, config), (task, config))
    return list(found.values())


def run_share(share: int, shares: int, wanted: Sequence[Task], device: torch.device) -> None:
    """Run every ``shares``-th candidate once, and print what becomes of each."""
    inputs: dict[tuple, Inputs] = {}
    for index, (task, config) in enumerate(distinct(wanted, device)):
        if index % shares != share:
            continue
        print(f"{STARTED}\t{task.family}\t{config!r}", flush=True)
        if task.case not in inputs:
            inputs = {task.case: Inputs(task.case, device)}
        operands = operands_of(task, inputs[task.case])
        try:
            product_with(task, config)(*operands)
            torch.cuda.synchronize(device)
        except Exception as error:
            print(f"{FAILED}\t{task.family}\t{config!r}\t{one_line(error)}", flush=True)
            torch.cuda.synchronize(device)  # raises where the context is gone, and ends this process
            continue
        print(f"{DONE}\t{task.family}\t{config!r}", flush=True)


def fatal(lines: Iterable[str], exit_code: int | None) -> list[tuple[str, str]]:
    """(family, config) of the candidate that a process ended with, if it did not end well. ``exit_code`` None: it was
    stopped from outside, which is no candidate's fault.
    """
    last = None
    for line in lines:
        word, *rest = line.rstrip("\n").split("\t")
        if word == STARTED and len(rest) == 2:
            last = (rest[0], rest[1])
        elif word == DONE:
            last = None
    return [last] if last is not None and exit_code not in (0, None) else []


def compile_ahead(
    models: Sequence[str] | None, quick: bool, device: torch.device, seconds: float
) -> frozenset[tuple[str, str]]:
    """Start the processes, wait for them at most ``seconds``, and return the candidates that a sweep must not run."""
    shares = processes()
    command = [sys.executable, "-m", "ditq_kernels.benchmark.ahead"]
    started = [
        subprocess.Popen(
            [*command, str(share), str(shares), str(device), "quick" if quick else "all", *(models or ())],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for share in range(shares)
    ]
    end = time.monotonic() + seconds
    found: list[tuple[str, str]] = []
    for process in started:
        stopped = False
        try:
            output, _ = process.communicate(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            stopped = True
        found += fatal(output.splitlines(), None if stopped else process.returncode)
    return frozenset(found)


def main(arguments: Sequence[str]) -> None:
    share, shares, device_name, extent, *models = arguments
    device = torch.device(device_name)
    torch.cuda.set_device(device)
    quick = extent == "quick"
    run_share(int(share), int(shares), tasks(select(models or None, quick=quick), quick), device)


if __name__ == "__main__":
    main(sys.argv[1:])
