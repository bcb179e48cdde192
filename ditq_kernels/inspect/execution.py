"""``ditq inspect --execute``: every form of every kernel computes on this CPU what a GPU would, and is judged.

A process runs cases, for each of several architectures in turn: what compiles to the same instructions for one as for
another, and is given the same data, is executed once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import gc
import multiprocessing
import os
import queue
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.managers import SyncManager

import torch

from ..kernels.config import shared_memory
from ..kernels.device import Device, standing_in
from ..revision import commit
from .cases import edges, extension, extension_int8, passes, products
from .cases.case import Case, Mismatch
from .executor import cuda
from .workers import end_with_parent

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
QUICK_ARCHITECTURES = (80, 90)
# Of these, the extension's kernels only.
WITHOUT_TRITON = {100: "the executor does not know tcgen05, which multiplies its 16-bit operands"}
OUTPUTS = {"y", "codes", "scales", "y_scales", "expanded", "grad_x"}  # arguments that kernels may write
# Triton puts a proxy fence between cp.async and wgmma since this version; see Session.copies_need_fence.
COPIES_FENCED_SINCE = (3, 7)
WOBBLE = 2  # units of the last place that approximate divisions, exponentials and roots may be off
OBJECTS_BETWEEN_COLLECTIONS = 50_000
SECONDS_BETWEEN_LOOKS = 0.5  # at whether the processes are done
OK = "ok"
VERDICTS = (OK, "MISMATCH", "FAULT", "REFUSED", "UNSUPPORTED", "ERROR")


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        verdict: "ok"; "MISMATCH", a wrong result; "FAULT", what a GPU would fault on or should not be asked to do;
            "REFUSED", by Triton; "UNSUPPORTED", an instruction that the executor does not know; "ERROR", any other.
        said: how well the result agrees, or what is wrong.
        seconds: of the case; ``launches``, ``steps``: kernels launched and PTX instructions issued for it.
        executed: how many of the launches were executed here, and not before with the same instructions and data.
        unfenced: launches in which matrix instructions read what cp.async wrote with no proxy fence between them, which
            is let through for old versions of Triton alone.
    """

    arch: int
    family: str
    name: str
    verdict: str
    said: str
    seconds: float
    launches: int
    executed: int
    steps: int
    unfenced: int = 0


def cases(arch: int, quick: bool = False, match: str = "") -> list[Case]:
    """The cases of an architecture (10 * major + minor), or the quick choice of them; those whose name holds
    ``match``.
    """
    of_the_extension = (extension, extension_int8)
    modules = of_the_extension if arch in WITHOUT_TRITON else (passes, products, edges, *of_the_extension)
    every = [case for module in modules for case in module.cases(arch)]
    return [case for case in every if match in case.name and (case.quick or not quick)]


def left_out(architectures: Sequence[int]) -> list[str]:
    """What has no cases on ``architectures``, each with the reason."""
    lines = [
        f"sm_{arch}: Triton's kernels are left out: {WITHOUT_TRITON[arch]}"
        for arch in architectures
        if arch in WITHOUT_TRITON
    ]
    reason = cuda.why_unavailable()
    return lines + ([f"the CUDA extension's kernels are left out: {reason}"] if reason else [])


def copies_need_fence() -> bool:
    """Of :class:`.executor.driver.Session`, for this version of Triton."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= COPIES_FENCED_SINCE


def _verdict(case: Case) -> tuple[str, str]:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    from .executor.faults import Fault, Unsupported

    try:
        return OK, case.compute()
    except Mismatch as error:
        return "MISMATCH", str(error)
    except (CompilationError, OutOfResources) as error:
        return "REFUSED", " ".join(str(error.__cause__ or error).split())[-200:]
    except Fault as error:
        return "FAULT", str(error)
    except Unsupported as error:
        return "UNSUPPORTED", str(error)
    except Exception as error:  # one case must not end the others
        return "ERROR", f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def run_case(case: Case, session) -> Outcome:
    """Compute ``case`` on the ``session``'s architecture (:class:`.executor.driver.Session`), installed already."""
    session.clear()
    started = time.perf_counter()
    with standing_in(Device("executed", session.arch, products.MULTIPROCESSORS)):
        verdict, said = _verdict(case)
    if verdict == OK:
        for launch in session.launches:
            for name, missing in launch.written.items():
                if name not in OUTPUTS:
                    verdict, said = "FAULT", f"writes to {name}"
                elif missing:
                    verdict, said = "FAULT", f"leaves {missing} bytes of {name} unwritten"
            if launch.disagreements:
                verdict, said = "FAULT", f"lanes disagree on a store to shared memory {launch.disagreements} times"
    return Outcome(
        session.arch,
        case.family,
        case.name,
        verdict,
        said,
        time.perf_counter() - started,
        len(session.launches),
        sum(not launch.repeated for launch in session.launches),
        sum(launch.steps for launch in session.launches),
        sum(launch.unfenced_copies > 0 for launch in session.launches),
    )


@dataclass(frozen=True)
class Request:
    """What a process is to run: the cases whose place among all names is ``part`` modulo ``parts``."""

    architectures: tuple[int, ...]
    quick: bool
    match: str
    part: int
    parts: int


@functools.cache  # what is garbage by a second time would stay for ever
def prepare_process() -> None:
    """Settings of a process that executes and does nothing else."""
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms would import the whole compiler
    torch.utils.deterministic.fill_uninitialized_memory = True  # what a kernel forgets to write is NaN or the largest
    # A program is tens of thousands of objects, and none of it garbage while it is made.
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)


def run(request: Request) -> Iterator[Outcome]:
    """The outcomes, case by case and for each architecture; compiles and executes in this process."""
    from .executor import driver

    prepare_process()
    sessions = {
        arch: driver.Session(arch, shared_memory(arch), WOBBLE, copies_need_fence=copies_need_fence())
        for arch in request.architectures
    }
    by_name: dict[str, list[tuple[int, Case]]] = {}
    for arch in sessions:
        for case in cases(arch, request.quick, request.match):
            by_name.setdefault(case.name, []).append((arch, case))
    with tempfile.TemporaryDirectory() as cache:
        for name in list(by_name)[request.part :: request.parts]:
            memory: dict = {}
            for arch, case in by_name[name]:
                sessions[arch].memory = memory
                driver.install(sessions[arch], cache)
                yield run_case(case, sessions[arch])


def _run_part(request: Request, outcomes) -> None:
    for outcome in run(request):
        outcomes.put(outcome)


def count(architectures: Sequence[int], quick: bool = False, match: str = "") -> int:
    """How many outcomes :func:`execute` yields."""
    return sum(len(cases(arch, quick, match)) for arch in architectures)


def execute(
    architectures: Sequence[int], quick: bool = False, match: str = "", workers: int | None = None
) -> Iterator[Outcome]:
    """Outcomes of all cases on ``architectures``, as they come, by ``workers`` processes (default: one a core)."""
    workers = workers or os.cpu_count() or 1
    environment = os.environ.pop("TRITON_INTERPRET", None)  # the workers compile, whatever this process does
    context = multiprocessing.get_context("spawn")
    try:
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
        manager = SyncManager(ctx=context)
        manager.start(end_with_parent)
        with manager, pool:
            outcomes = manager.Queue()
            parts = 4 * workers  # several each, so that none is long idle at the end
            requests = [Request(tuple(architectures), quick, match, part, parts) for part in range(parts)]
            jobs = [pool.submit(_run_part, request, outcomes) for request in requests]
            while not (all(job.done() for job in jobs) and outcomes.empty()):
                with contextlib.suppress(queue.Empty):
                    yield outcomes.get(timeout=SECONDS_BETWEEN_LOOKS)
            for job in jobs:
                job.result()  # raises what ended a process
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment


def line(outcome: Outcome) -> str:
    """The outcome as a row of a table."""
    return f"sm_{outcome.arch:<4}{outcome.verdict:12}{outcome.name}: {outcome.said} ({outcome.seconds:.1f} s)"


def summary(outcomes: Iterable[Outcome]) -> list[str]:
    """Lines: how many cases of each family and architecture got which verdict, and all together."""
    outcomes = list(outcomes)
    table: dict[tuple[int, str], dict[str, int]] = {}
    for outcome in outcomes:
        row = table.setdefault((outcome.arch, outcome.family), {})
        row[outcome.verdict] = row.get(outcome.verdict, 0) + 1
    lines = [
        f"sm_{arch:<4}{family:12}" + ", ".join(f"{row[verdict]} {verdict}" for verdict in VERDICTS if verdict in row)
        for (arch, family), row in sorted(table.items())
    ]
    failed = sum(outcome.verdict != OK for outcome in outcomes)
    launches, executed = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("launches", "executed"))
    unfenced = sum(outcome.unfenced > 0 for outcome in outcomes)
    if unfenced:
        lines.append(
            f"in {unfenced} cases wgmma reads what cp.async wrote with no fence.proxy.async between them, which PTX "
            "asks for: this version of Triton puts none there, nor does CUTLASS in its own such loop; let through"
        )
    return [
        *lines,
        f"{len(outcomes)} cases, {failed} of them not ok; {launches} launches, {executed} executed here and the others "
        f"the same as one of these; {sum(outcome.steps for outcome in outcomes)} PTX instructions issued",
    ]


def record(outcomes: Sequence[Outcome]) -> dict:
    """What to keep of a run: versions and commit, the summary, and each outcome."""
    import triton

    return dict(
        commit=commit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        triton=triton.__version__,
        torch=torch.__version__,
        summary=summary(outcomes),
        left_out=left_out(sorted({outcome.arch for outcome in outcomes})),
        outcomes=[dataclasses.asdict(outcome) for outcome in outcomes],
    )
