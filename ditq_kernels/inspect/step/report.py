"""A model's steps, traced in several forms side by side: as a table, and as JSON."""

from __future__ import annotations

import contextlib
import datetime
import functools
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict

import torch

from ...published import MODELS
from ...revision import commit
from ..bounds import GPUS
from ..workers import end_with_parent
from . import launches
from .trace import BUILT, Form, Step, trace
from .work import Total

STEP, REST = "step", "outside blocks"
Totals = dict[str, Total]  # by the name of a list of blocks, of one block of it; and REST and STEP


def forms(scheme: str) -> tuple[Form, ...]:
    """What stands side by side: 16 bits, ``scheme``, and ``scheme`` fused; as they are, and compiled."""
    quantized = (None, False), (scheme, False), (scheme, True)
    return tuple(Form(*one, compiled) for compiled in (False, True) for one in quantized)


def totals(name: str, step: Step, arch: int) -> Totals:
    """Of a step of the model ``name``: what blocks of the middle do is multiplied to its depth."""
    of = functools.partial(Total.of, arch=arch, gpu=GPUS[arch])
    published = MODELS[name]
    whole = rest = of(step.rest)
    found: Totals = {}
    for blocks, depth in published.blocks().items():
        found[blocks] = of(step.block(blocks))
        whole = whole.plus(found[blocks].times(depth - BUILT))
        for kernels in step.blocks[blocks]:
            whole = whole.plus(of(kernels))
    return found | {REST: rest, STEP: whole.times(published.calls)}


_of_process = contextlib.ExitStack()


def _begin(arch: int) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    _of_process.enter_context(launches.installed(arch))


def attempt(name: str, form: Form, arch: int) -> Step | str:
    """:func:`.trace.trace`, or in one line why there is nothing: PyTorch's compiler asks some models' tensors for more
    than their shapes.
    """
    try:
        return trace(name, form, arch)
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def traced(name: str, scheme: str, arch: int, workers: int | None = None) -> Iterator[tuple[Form, Step | str]]:
    """Each of :func:`forms`, in this order, by ``workers`` processes (default: one a core); or why it is missing.

    Raises:
        ValueError: if a process is ended from outside.
    """
    environment = os.environ.pop("TRITON_INTERPRET", None)  # the workers compile, whatever this process does
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers or os.cpu_count() or 1, context, _begin, (arch,)) as pool:
            asked = forms(scheme)
            steps = pool.map(attempt, *zip(*((name, form, arch) for form in asked), strict=True))
            yield from zip(asked, steps, strict=True)
    except BrokenProcessPool as error:
        raise ValueError("a process that traces was ended from outside, by the system if memory is short") from error
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment


def weights(name: str, scheme: str) -> str:
    """What is stored, of the quantized layers and of the whole model, against 16 bits."""
    from ...model.planning import plan

    model = MODELS[name].build()
    chosen = plan(model, scheme)
    stored = sum(entry.stored_bits for entry in chosen.quantized()) // 8
    plain = 2 * sum(entry.weights for entry in chosen.quantized())
    whole = 2 * sum(one.numel() for one in model.parameters())
    left = whole - plain + stored
    return (
        f"{scheme} stores {stored / plain:.3f} of the quantized layers' 16 bits; of the model's {whole / 1e9:.2f} GB "
        f"{left / 1e9:.2f} are left: {left / whole:.3f}"
    )


HEADER = ("of", "", "launches", "passes, MB", "activations, MB", "weights, MB", "10⁹ MACs", "bound, µs")
LEGEND = (
    "passes: bytes of activations that are moved outside products and attention; MACs: multiply-accumulates; bound: "
    "what the GPU's published rates allow at best, no prediction"
)


def table(name: str, found: Mapping[Form, Totals]) -> str:
    """For people, in Markdown, in columns."""
    published = MODELS[name]
    depths = published.blocks()
    rows: list[Sequence[str]] = [HEADER]
    for part in (STEP, *depths, REST):
        of = f"1 of {depths[part]} {part}" if part in depths else part
        if part == STEP and published.calls > 1:
            of = f"step ({published.calls} calls)"
        rows += [(of, form.name, *_cells(totals_of[part])) for form, totals_of in found.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(_padded(row, widths)) + " |" for row in rows]
    return "\n".join((lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]))


def _padded(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.ljust(width) if place < 2 else cell.rjust(width)


def _cells(total: Total) -> tuple[str, ...]:
    megabytes = (f"{value / 1e6:.1f}" for value in (total.passed, total.activations, total.weights))
    return str(total.launches), *megabytes, f"{total.macs / 1e9:.1f}", f"{total.bound:.0f}"


def record(name: str, scheme: str, arch: int, steps: Mapping[Form, Step]) -> dict:
    """All that was found, for a JSON file, with versions, commit and date."""
    import diffusers
    import triton

    return {
        "model": name,
        "about": MODELS[name].about,
        "gpu": asdict(GPUS[arch]) | {"arch": arch},
        "scheme": scheme,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "diffusers": diffusers.__version__,
        "weights": weights(name, scheme),
        "forms": [
            asdict(form)
            | {
                "name": form.name,
                "totals": {part: asdict(total) for part, total in totals(name, step, arch).items()},
                "kernels": {part: [asdict(one) for one in step.block(part)] for part in step.blocks},
            }
            for form, step in steps.items()
        ],
    }
