"""What ``ditq bench`` and ``ditq tune`` do once it is clear what there is to measure."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..progress import advancing, track
from . import report
from .cases import select
from .provenance import cpu, gpu, provenance
from .run import Run, contenders_for, run
from .timing import CudaStopwatch, Stopwatch

BENCH_SECONDS = 600.0
SHARE_COMPILED_AHEAD = 0.4  # of a sweep's time, at most


@dataclass(frozen=True)
class BenchSettings:
    """Attributes:
    models, schemes, rows: what to measure; None: all.
    quick: the targets' shapes only.
    seconds: time to start new cases in.
    """

    out: Path
    models: Sequence[str] | None = None
    schemes: Sequence[str] | None = None
    rows: Sequence[int] | None = None
    quick: bool = False
    seconds: float = BENCH_SECONDS


def bench(settings: BenchSettings, device: torch.device, stopwatch: Stopwatch | None = None) -> Run:
    """Measure, print the table and the verdicts, write JSON and pictures below ``settings.out``.

    Raises:
        ValueError: for an unknown model or scheme, or a selection without a case.
    """
    contenders = contenders_for(settings.schemes)
    cases = select(settings.models, settings.rows, settings.quick)
    if not cases:
        raise ValueError("no case has this number of rows; the table is in ditq_kernels/shapes.py")
    described, versions = gpu(device), provenance()
    path = settings.out / report.RESULTS_FILE

    def save(found: Run) -> dict[str, Any]:
        content = report.as_json(found, described, versions)
        report.write(path, content)
        return content

    found = run(
        cases,
        contenders,
        device,
        stopwatch or CudaStopwatch(device),
        settings.seconds,
        lambda steps, total: track(steps, total, "case"),
        save,
    )
    content = save(found)
    print(report.table(content))
    print()
    print(report.verdict_lines(found))
    print(f"\n{path}{_draw(content, settings.out)}")
    return found


def bench_quantizing(out: Path) -> int:
    """Measure how fast weights are quantized on this CPU, print the table, and write JSON and a picture below ``out``;
    the exit code.
    """
    from . import quantizing

    turns = len(quantizing.SHAPES) * len(quantizing.QUANTIZERS) * (quantizing.ROUNDS + 1)
    with advancing(turns, "turn") as advance:
        rates = list(quantizing.measure(advance=advance))
    compensated = quantizing.compensated_seconds()
    about = provenance() | dict(cpu=cpu())
    path = out / "quantizing.json"
    report.write(path, quantizing.record(rates, compensated, about))
    print(quantizing.table(rates))
    shape = " x ".join(map(str, quantizing.COMPENSATED_SHAPE))
    seconds = statistics.median(compensated)
    print(f"\nerror-compensated rounding of {shape} to w4a8_g128: {seconds:.2f} s")
    print(_machine(about))
    try:
        from .pictures import draw_rates

        print(f"{path}  {draw_rates(rates, out)}")
    except ImportError as error:
        print(f"{path}  (no picture: {error})")
    return 0


def bench_cpu(out: Path, quick: bool) -> int:
    """Measure how long blocks of models take on this CPU, print the table, and write JSON and a picture below ``out``;
    the exit code, 1 where one of our own fails. ``quick``: not compiled, in few rounds.
    """
    from . import cpu_blocks

    compiled = (False,) if quick else (False, True)
    rounds = cpu_blocks.QUICK_ROUNDS if quick else cpu_blocks.ROUNDS
    with advancing(cpu_blocks.steps(cpu_blocks.SUBJECTS, cpu_blocks.CONTENDERS, compiled, rounds), "step") as advance:
        timings = list(cpu_blocks.measure(compiled=compiled, rounds=rounds, advance=advance))
    about = provenance() | dict(cpu=cpu())
    path = out / "cpu_blocks.json"
    report.write(path, cpu_blocks.record(timings, about))
    print(cpu_blocks.table(timings))
    print(f"\n{_machine(about)}")
    try:
        from .pictures import draw_timings

        print(f"{path}  {draw_timings(timings, out)}")
    except ImportError as error:
        print(f"{path}  (no picture: {error})")
    return 1 if any(cpu_blocks.is_ours_and_failed(timing) for timing in timings) else 0


def bench_steps(
    out: Path, device: torch.device, models: Sequence[str] | None, schemes: Sequence[str] | None, blocks: int | None
) -> int:
    """Measure how long steps of published models take, print the table, and write JSON below ``out``; the exit code, 1
    where one of our own fails.

    Args:
        models: beginnings of keys of :data:`ditq_kernels.published.MODELS`; None: all.
        blocks: of each kind, None: as many as are published.

    Raises:
        ValueError: for a model that is not known, or an unknown scheme.
    """
    from ..layer.formats import Scheme
    from ..published import MODELS
    from . import steps

    names = [name for name in MODELS if models is None or name.startswith(tuple(models))]
    if not names:
        raise ValueError(f"no model's name begins with {' or '.join(models)}; --steps takes {', '.join(MODELS)}")
    for scheme in schemes or ():
        Scheme.parse(scheme)
    wanted = steps.contenders(schemes)
    about = provenance() | (dict(gpu=gpu(device)) if device.type == "cuda" else dict(cpu=cpu()))
    path = out / "steps.json"
    timings = []
    with advancing(steps.turns(names, wanted, steps.ROUNDS), "turn") as advance:
        for timing in steps.measure(names, wanted, device, blocks, advance=advance):
            timings.append(timing)
            report.write(path, steps.record(timings, blocks, about))
    print(steps.table(timings))
    depth = "as many blocks as are published" if blocks is None else f"{blocks} blocks of each kind"
    print(f"\n{depth}; torch {about['torch']}\n{path}")
    return 1 if any(map(steps.is_ours_and_failed, timings)) else 0


def _machine(about: dict[str, Any]) -> str:
    machine = about["cpu"]
    return (
        f"{machine['name']}, {machine['threads']} threads, {machine['instructions']}, our products by "
        f"{machine['products']}; torch {about['torch']}"
    )


def _draw(content: dict[str, Any], directory: Path) -> str:
    """Draw, and say what was drawn."""
    try:
        from .pictures import draw

        return "".join(f"  {picture}" for picture in draw(content, directory))
    except ImportError as error:
        return f"  (no pictures: {error})"


def tune(
    models: Sequence[str] | None,
    seconds: float,
    out: Path | None,
    device: torch.device,
    quick: bool = False,
    stopwatch: Stopwatch | None = None,
    ahead: Callable[..., frozenset[tuple[str, str]]] | None = None,
) -> int:
    """Sweep, write the table, and say what was found; the exit code. A table that is there already keeps what it says
    of problems that this sweep does not settle.

    Args:
        out: directory of tables; None: where they are looked for first.
        quick: only what targets are set for.

    Raises:
        ValueError: for an unknown model, or a file in the table's place that is none.
    """
    from ..kernels import tables
    from ..kernels.device import describe
    from .ahead import compile_ahead
    from .tune import Sweep, sweep, tasks

    wanted = tasks(select(models, quick=quick), quick)
    name = describe(device).name
    path = tables.table_path(out or tables.user_directory(), name)
    earlier_runs, earlier_entries = tables.read(path) if path.exists() else ([], [])
    runs = [*earlier_runs, provenance() | dict(gpu=gpu(device))]
    started = time.monotonic()
    skip = (ahead or compile_ahead)(models, quick, device, SHARE_COMPILED_AHEAD * seconds)
    for family, config in sorted(skip):
        print(f"left out, its process did not survive it: {family}: {config}")

    def save(found: Sweep) -> None:
        kept = [entry for entry in earlier_entries if entry.key not in found.settled]
        tables.write(path, name, [*kept, *found.entries], runs)

    found = sweep(
        wanted,
        device,
        stopwatch or CudaStopwatch(device),
        max(0.0, seconds - (time.monotonic() - started)),
        lambda steps: track(steps, len(wanted), "problem"),
        save,
        skip,
    )
    save(found)
    for entry in found.entries:
        default = entry.heuristic_microseconds
        gain = (
            f"{default / entry.microseconds:.2f}x the heuristic's choice"
            if default
            else "the heuristic's choice failed"
        )
        print(
            f"{entry.weights} x {8 * entry.activation_bytes}-bit M<={entry.rows} N={entry.out_features} "
            f"K={entry.in_features}: {entry.config}, {entry.microseconds:.1f} us, {gain}"
        )
    for failure in found.failures:
        print(f"not timed: {failure.task}: {failure.config}: {failure.reason}")
    print(
        f"{path}: {len(found.settled)} of {len(wanted)} problems settled, {len(found.entries)} where the heuristic's "
        f"choice was beaten by more than the spread, {len(found.failures)} candidates not timed, "
        f"{len(found.not_reached)} problems not reached in the time given"
    )
    if found.lost:
        print(f"the GPU failed for good {found.lost}")
    return 1 if found.lost else 0
