"""The sweep behind ``ditq tune``: every valid configuration of a problem, checked and then timed; where one beats the
heuristic's choice by more than the spread, it goes into the table that :mod:`ditq_kernels.kernels.tables` reads.

All candidates are timed briefly first; the best few and the heuristic's choice then race.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..layer.error_budget import Arithmetic
from ..layer.formats import WEIGHT_FORMATS, WeightFormat
from ..layer.packed_weight import PackedWeight
from .cases import TARGET_SHAPES, Case
from .contenders import DTYPE, Inputs, Prepared, a16_oracle, arithmetic_of, check, int8_oracle, nbytes
from .run import one_line
from .timing import CudaStopwatch, DeviceLost, Recording, Stopwatch, Timing, interleave, record, rotation

if TYPE_CHECKING:
    from ..kernels.config import Config, Problem
    from ..kernels.tables import Entry

BRIEF_ROUNDS = 3
FINALISTS = 4
# (weight format, bytes of an activation), the order of importance: the first few are what the targets speak of.
FAMILIES: tuple[tuple[str, int], ...] = (
    ("w8", 1),
    ("w4_g128", 1),
    ("w4_g128", 2),
    ("w8", 2),
    ("w8_g128", 2),
    ("w8_g128", 1),
    *((name, size) for name in WEIGHT_FORMATS for size in (1, 2) if name not in ("w8", "w4_g128", "w8_g128")),
)
TARGET_FAMILIES = FAMILIES[:5]


@dataclass(frozen=True)
class Task:
    """One problem to tune: a case, the weights' format, and the bytes of an activation."""

    case: Case
    fmt: WeightFormat
    activation_bytes: int

    @property
    def family(self) -> str:
        """What its candidates are compiled for, whatever the shape."""
        return f"{self.fmt.name} x {8 * self.activation_bytes}-bit"

    def __str__(self) -> str:
        return f"{self.family}, {self.case}"


@dataclass(frozen=True)
class Failure:
    """A candidate that was not timed, and why."""

    task: Task
    config: str
    reason: str


@dataclass
class Sweep:
    """Attributes:
    entries: winners that beat the heuristic's choice.
    settled: keys, as :attr:`Entry.key`, of problems that were finished, winners or not.
    not_reached: problems that the time did not suffice for.
    lost: why the device failed for good, if it did.
    """

    entries: list[Entry] = field(default_factory=list)
    settled: set[tuple[str, int, int, int, int]] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    not_reached: list[Task] = field(default_factory=list)
    lost: str | None = None


def tasks(cases: Iterable[Case], quick: bool = False) -> list[Task]:
    """The problems of ``cases``, one for each class of rows: those that targets are set for first, then by family,
    within it as the cases come. Modulation layers have 16-bit activations only.

    Args:
        quick: those that targets are set for, and no others.
    """
    from ..kernels.config import row_class

    cases = list(cases)
    targets = [case for case in cases if case.shape in TARGET_SHAPES]
    ordered = [*itertools.product(TARGET_FAMILIES, targets), *([] if quick else itertools.product(FAMILIES, cases))]
    found: dict[tuple, Task] = {}
    for (name, activation_bytes), case in ordered:
        if case.modulation and activation_bytes == 1:
            continue
        key = (name, activation_bytes, row_class(case.rows), case.out_features, case.in_features)
        found.setdefault(key, Task(case, WEIGHT_FORMATS[name], activation_bytes))
    return list(found.values())


def operands_of(task: Task, inputs: Inputs) -> tuple[Any, ...]:
    """The operands of one task's product."""
    layer = inputs.stored(task.fmt)
    weight = (layer.qweight, layer.scale, layer.group_code, layer.bias)
    return (*inputs.codes, *weight) if task.activation_bytes == 1 else (inputs.x, *weight)


def oracle_of(task: Task, inputs: Inputs) -> Callable[[Config], tuple[torch.Tensor, torch.Tensor]]:
    """(exact result, error budget) of :func:`product_with` by a configuration, computed once for all that do the same
    to numbers.
    """
    layer = inputs.stored(task.fmt)

    @functools.cache
    def oracle(arithmetic: Arithmetic) -> tuple[torch.Tensor, torch.Tensor]:
        return int8_oracle(inputs, layer) if task.activation_bytes == 1 else a16_oracle(inputs, layer, arithmetic)

    return lambda config: oracle(arithmetic_of(config, task.activation_bytes))


def product_with(task: Task, config: Config) -> Callable[..., torch.Tensor]:
    """The product of :func:`operands_of`, as ``config`` says."""
    from ..kernels import dispatch

    def a8(qx, sx, qweight, scale, group_code, bias):
        weight = PackedWeight(qweight, scale, group_code, task.fmt, task.case.in_features)
        return dispatch.linear_a8(qx, sx, weight, bias, DTYPE, config=config)

    def a16(x, qweight, scale, group_code, bias):
        weight = PackedWeight(qweight, scale, group_code, task.fmt, task.case.in_features)
        return dispatch.linear_a16(x, weight, bias, config=config)

    return a8 if task.activation_bytes == 1 else a16


def problem_of(task: Task, operands: Sequence[torch.Tensor]) -> Problem:
    """What the kernels' choice of a configuration is made by."""
    from ..kernels import dispatch

    return dispatch.problem_of(operands[0], task.case.out_features, task.fmt)


def record_candidates(
    task: Task,
    inputs: Inputs,
    candidates: Iterable[Config],
    stopwatch: Stopwatch,
    failures: list[Failure],
) -> dict[Config, Recording]:
    """Check each candidate's result and record it. A wrong or failing one goes into ``failures``, the others go on.

    Raises:
        DeviceLost: if the device fails for good.
    """
    operands, oracle = operands_of(task, inputs), oracle_of(task, inputs)
    written = DTYPE.itemsize * task.case.rows * task.case.out_features
    sets = rotation(operands, nbytes(*operands) + written, stopwatch.l2_bytes)  # the same for all candidates
    recordings: dict[Config, Recording] = {}
    for config in candidates:
        prepared = Prepared(product_with(task, config), operands, nbytes(*operands), *oracle(config), poisons=True)
        try:
            found = check(prepared, inputs)
            if not found.passed:
                failures.append(Failure(task, str(config), f"wrong result: {found}"))
                continue
            recordings[config] = record(prepared.call, sets, stopwatch)
        except DeviceLost:
            raise
        except Exception as error:  # out of registers, out of memory, a compiler's crash: the next one may do
            failures.append(Failure(task, str(config), one_line(error)))
            if isinstance(stopwatch, CudaStopwatch):
                stopwatch.assert_alive()
    return recordings


def race(recordings: dict[Config, Recording], heuristic: Config, stopwatch: Stopwatch) -> dict[Config, Timing]:
    """Timings of the fastest few of ``recordings`` and of the heuristic's choice."""
    brief = {
        config: timing
        for config, timing in interleave(recordings, stopwatch, BRIEF_ROUNDS).items()
        if isinstance(timing, Timing)
    }
    finalists = sorted(brief, key=lambda config: brief[config].microseconds)[:FINALISTS]
    chosen = {config: recordings[config] for config in dict.fromkeys((*finalists, heuristic)) if config in brief}
    final = interleave(chosen, stopwatch)
    return {config: timing for config, timing in final.items() if isinstance(timing, Timing)}


def winner(task: Task, problem: Problem, timings: dict[Config, Timing], heuristic: Config) -> Entry | None:
    """The table's entry for a problem: None where no configuration beats the heuristic's choice by more than the
    spread, or where that choice could not be timed and nothing else either. A choice that failed is replaced by the
    fastest that did not.
    """
    from ..kernels.tables import Entry

    if not timings:
        return None
    best = min(timings, key=lambda config: timings[config].microseconds)
    default = timings.get(heuristic)
    if default is not None and (best == heuristic or not timings[best].beats(default)):
        return None
    return Entry(
        task.fmt.name,
        task.activation_bytes,
        problem.rows,
        problem.out_features,
        problem.in_features,
        best,
        timings[best].microseconds,
        default.microseconds if default is not None else None,
    )


def sweep(
    wanted: Sequence[Task],
    device: torch.device,
    stopwatch: Stopwatch,
    seconds: float | None = None,
    progress: Callable[[Iterable[Task]], Iterable[Task]] = lambda steps: steps,
    after_task: Callable[[Sweep], None] = lambda found: None,
    skip: frozenset[tuple[str, str]] = frozenset(),
    clock: Callable[[], float] = time.monotonic,
) -> Sweep:
    """Tune ``wanted`` in their order until ``seconds`` are over.

    Args:
        after_task: sees what has been found so far.
        skip: (family, repr of the configuration) of candidates not to run.
    """
    from ..kernels.config import candidates
    from ..kernels.estimates import heuristic

    found = Sweep()
    end = None if seconds is None else clock() + seconds

    def over() -> bool:
        return end is not None and clock() > end

    cached: tuple[Case, Inputs] | None = None
    for task in progress(wanted):
        if found.lost or over():
            found.not_reached.append(task)
            continue
        try:
            if cached is None or cached[0] != task.case:
                cached = task.case, Inputs(task.case, device)
            operands = operands_of(task, cached[1])
            problem = problem_of(task, operands)
            default = heuristic(problem)
            # The heuristic's choice first: without its time there is nothing to compare with.
            ordered = dict.fromkeys((default, *candidates(problem)))
            possible = [config for config in ordered if (task.family, repr(config)) not in skip]
            reached: Iterator[Config] = itertools.takewhile(lambda _: not over(), possible)
            recordings = record_candidates(task, cached[1], reached, stopwatch, found.failures)
            if over():
                found.not_reached.append(task)  # a race among some of its candidates would settle nothing
            else:
                entry = winner(task, problem, race(recordings, default, stopwatch), default)
                if entry is not None:
                    found.entries.append(entry)
                found.settled.add(
                    (task.fmt.name, task.activation_bytes, problem.rows, problem.out_features, problem.in_features)
                )
        except DeviceLost as error:
            found.lost = f"during {task}: {error}"
        except torch.cuda.OutOfMemoryError as error:
            found.failures.append(Failure(task, "all", one_line(error)))
        after_task(found)
    return found
