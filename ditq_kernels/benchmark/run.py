"""One run of the benchmark: for each case every contender is prepared, checked, recorded, and timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from . import ceilings as roofs
from .cases import Case
from .checks import Check
from .contenders import TORCH, Contender, Inputs, Unavailable, ceiling_contenders, check, ours
from .elementwise import PASSES, PassContender
from .peers import PEERS
from .timing import CudaStopwatch, DeviceLost, Recording, Stopwatch, Timing, interleave, record, rotation

PASS_ROWS = 512  # passes over activations are measured from this many rows on
OUTPUT_BYTES = 2
CHECK_FAILED = "check failed"


@dataclass
class Result:
    """One contender in one case: a timing of a checked result, or the reason why there is none.

    Attributes:
        moved: bytes that have to be read and written.
        failure: why there is no timing, in one sentence.
    """

    contender: str
    family: str
    timing: Timing | None = None
    check: Check | None = None
    config: str | None = None
    note: str = ""
    moved: int | None = None
    failure: str | None = None


@dataclass
class CaseResults:
    """Attributes:
    kind: "product", or "pass" over activations.
    """

    kind: str
    case: Case
    results: list[Result]


@dataclass
class Run:
    """Everything that one run found.

    Attributes:
        not_reached: cases that the time did not suffice for.
        lost: why the device failed for good, if it did; what was measured before stands.
    """

    ceilings: roofs.Ceilings | None = None
    products: list[CaseResults] = field(default_factory=list)
    passes: list[CaseResults] = field(default_factory=list)
    not_reached: list[str] = field(default_factory=list)
    lost: str | None = None


def one_line(error: BaseException) -> str:
    """The error, in one line that names its type."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _alive(stopwatch: Stopwatch) -> None:
    if isinstance(stopwatch, CudaStopwatch):
        stopwatch.assert_alive()


def measure(
    prepare: dict[str, Callable[[Result], Recording]], results: dict[str, Result], stopwatch: Stopwatch
) -> None:
    """Fill ``results`` in: each contender is prepared and checked, and those that pass are timed in turns.

    Args:
        prepare: by contender, what checks it, notes that in its result, and records it.

    Raises:
        DeviceLost: if the device fails for good.
    """
    recordings: dict[str, Recording] = {}
    for name, preparation in prepare.items():
        try:
            recordings[name] = preparation(results[name])
        except Unavailable as reason:
            results[name].failure = str(reason)
        except DeviceLost:
            raise
        except Exception as error:  # a peer may fail in any way; the reason is reported
            results[name].failure = one_line(error)
            _alive(stopwatch)
    for name, timing in interleave(recordings, stopwatch, eager=True).items():
        if isinstance(timing, Timing):
            results[name].timing = timing
        else:
            results[name].failure = one_line(timing)


class CheckFailed(Unavailable):
    """A result was wrong: nothing is timed."""

    def __init__(self, found: Check) -> None:
        super().__init__(f"{CHECK_FAILED}: {found}")


def measure_products(
    case: Case, contenders: Sequence[Contender], device: torch.device, stopwatch: Stopwatch
) -> CaseResults:
    """One product, by all ``contenders``."""
    inputs = Inputs(case, device)
    results = {contender.name: Result(contender.name, contender.family) for contender in contenders}

    def preparation(contender: Contender) -> Callable[[Result], Recording]:
        def prepare(result: Result) -> Recording:
            prepared = contender.prepare(inputs)
            result.config, result.note = prepared.config, prepared.note
            result.moved = prepared.set_bytes + OUTPUT_BYTES * case.rows * case.out_features
            result.check = check(prepared, inputs)
            if not result.check.passed:
                raise CheckFailed(result.check)
            sets = rotation(prepared.operands, result.moved, stopwatch.l2_bytes)
            return record(prepared.call, sets, stopwatch)

        return prepare

    measure({contender.name: preparation(contender) for contender in contenders}, results, stopwatch)
    return CaseResults("product", case, list(results.values()))


def measure_passes(
    case: Case, contenders: Sequence[PassContender], device: torch.device, stopwatch: Stopwatch
) -> CaseResults:
    """The passes over x [M, K] of ``case``."""
    results = {contender.name: Result(contender.name, "ours") for contender in contenders}

    def preparation(contender: PassContender) -> Callable[[Result], Recording]:
        def prepare(result: Result) -> Recording:
            ready = contender.prepare(case, device)
            result.moved = ready.moved
            result.check = ready.verify()
            if not result.check.passed:
                raise CheckFailed(result.check)
            return record(ready.call, rotation(ready.operands, ready.moved, stopwatch.l2_bytes), stopwatch)

        return prepare

    measure({contender.name: preparation(contender) for contender in contenders}, results, stopwatch)
    return CaseResults("pass", case, list(results.values()))


def tflops(case: Case, result: Result) -> float | None:
    """TFLOP/s of a product."""
    return None if result.timing is None else case.flops / result.timing.microseconds * 1e-6


def measure_ceilings(device: torch.device, stopwatch: Stopwatch) -> roofs.Ceilings:
    """The copy bandwidth, and the largest products."""
    copy_gbs = roofs.copy_bandwidth(device, stopwatch)
    case = Case(*roofs.LARGEST_PRODUCT)
    found = measure_products(case, ceiling_contenders(), device, stopwatch)
    rates = {result.contender: tflops(case, result) for result in found.results if result.timing is not None}
    return roofs.Ceilings(copy_gbs, roofs.best(rates))


def pass_cases(cases: Iterable[Case]) -> list[Case]:
    """The distinct inputs [M, K] of ``cases`` that are worth a measurement of the passes over them."""
    shapes = dict.fromkeys((case.rows, 0, case.in_features) for case in cases if case.rows >= PASS_ROWS)
    return [Case(*shape) for shape in shapes]


def contenders_for(schemes: Sequence[str] | None) -> tuple[Contender, ...]:
    """All contenders; of ours, those of ``schemes`` if given.

    Raises:
        ValueError: for an unknown scheme.
    """
    return (*TORCH, *(ours() if schemes is None else ours(tuple(schemes))), *PEERS)


def run(
    cases: Sequence[Case],
    contenders: Sequence[Contender],
    device: torch.device,
    stopwatch: Stopwatch,
    seconds: float | None = None,
    progress: Callable[[Iterator, int], Iterable] = lambda steps, total: steps,
    after_step: Callable[[Run], None] = lambda run: None,
    clock: Callable[[], float] = time.monotonic,
) -> Run:
    """Measure ``cases`` in their order until ``seconds`` are over; at least the ceilings are measured.

    Args:
        progress: wraps the steps in a progress bar.
        after_step: sees what has been found so far.
    """
    found = Run()
    deadline = None if seconds is None else clock() + seconds
    passes = pass_cases(cases)

    def steps() -> Iterator[tuple[str, Callable[[], None]]]:
        def ceilings() -> None:
            found.ceilings = measure_ceilings(device, stopwatch)

        yield "ceilings", ceilings
        # One pass after each product, so that a short run has both.
        for index in range(max(len(cases), len(passes))):
            if index < len(cases):
                case = cases[index]
                yield (
                    str(case),
                    lambda case=case: found.products.append(measure_products(case, contenders, device, stopwatch)),
                )
            if index < len(passes):
                case = passes[index]
                yield (
                    f"passes over {case.rows} x {case.in_features}",
                    lambda case=case: found.passes.append(measure_passes(case, PASSES, device, stopwatch)),
                )

    for index, (name, step) in enumerate(progress(steps(), 1 + len(cases) + len(passes))):
        if found.lost or (index and deadline is not None and clock() > deadline):
            found.not_reached.append(name)
            continue
        try:
            step()
        except DeviceLost as error:
            found.lost = f"during {name}: {error}"
        except torch.cuda.OutOfMemoryError as error:
            found.not_reached.append(f"{name} ({one_line(error)})")
        after_step(found)
        if device.type == "cuda" and not found.lost:
            torch.cuda.empty_cache()
    return found


def with_timing(run: Run) -> Iterator[tuple[CaseResults, Result]]:
    """The results that have a timing."""
    for case in (*run.products, *run.passes):
        for result in case.results:
            if result.timing is not None:
                yield case, result
