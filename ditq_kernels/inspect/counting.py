"""``ditq inspect --execute --counters``: what the kernels of real layers ask of the memories, counted by the executor
(:mod:`.executor.counters`) on some thread blocks and scaled to the grid. Nothing in it is a time.
"""

from __future__ import annotations

import datetime
import gc
import math
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict

import torch

from ..kernels import activation, dispatch
from ..kernels.config import cdiv, shared_memory
from ..kernels.device import Device, standing_in
from ..layer.extension import INT8_CAPABILITY, TILES, choose_tile, clusters_at_once
from ..layer.formats import WEIGHT_FORMATS
from ..layer.packing import BLOCK
from ..revision import commit
from .bounds import GPUS, bounds, plain_bound
from .cases.inputs import generator, stored
from .counted import CUDA, Count, Loop, Subject
from .execution import WITHOUT_TRITON, copies_need_fence, prepare_process
from .workers import end_with_parent

ARCHITECTURES = tuple(GPUS)
BLOCKS = 2  # of a launch, that are executed, each from the middle of a half of the grid


def compute(subject: Subject) -> None:
    """What is counted, by the kernels that are chosen for it."""
    from .executor import cuda, cuda_int8

    rows, inputs = subject.rows, subject.in_features
    x = torch.randn(rows, inputs, generator=generator(0)).to(torch.bfloat16)
    if not subject.fmt:
        activation.quantize_activation(x)
        return
    weight, bias = stored(WEIGHT_FORMATS[subject.fmt], subject.out_features, inputs)
    bias = bias.to(x.dtype)
    if subject.activations == "bf16":
        product = cuda.small_product if subject.by == CUDA else dispatch.linear_a16
        product(x, weight, bias)
        return
    qx = torch.randint(-127, 128, (rows, inputs), generator=generator(0), dtype=torch.int8)
    if subject.by == CUDA:
        number, clusters = _extension_tile(subject)
        cuda_int8.int8_product(qx, torch.ones(rows), weight.qweight, weight.scale, bias, x.dtype, number, clusters)
        return
    dispatch.linear_a8(qx, torch.ones(rows), weight, bias, x.dtype)


def _extension_tile(subject: Subject) -> tuple[int, int]:
    """(the place in TILES that is chosen for the product, clusters that run at once)."""
    multiprocessors = GPUS[INT8_CAPABILITY].multiprocessors
    number = choose_tile(subject.rows, subject.out_features, subject.in_features, multiprocessors)
    return number, clusters_at_once(TILES[number], multiprocessors)


def loop_of(subject: Subject) -> Loop | None:
    """Of the product that is chosen; None of what has no loop of matrix products."""
    from .executor import cuda_int8

    if not subject.fmt:
        return None
    if subject.by == CUDA:
        if subject.activations == "bf16":
            return None
        tile = TILES[_extension_tile(subject)[0]]
        return Loop(tile.rows, tile.outputs, cuda_int8.STEP, cuda_int8.stages(tile), True)
    entering = torch.int8 if subject.activations == "int8" else torch.bfloat16
    x = torch.empty((subject.rows, subject.in_features), dtype=entering)
    config = dispatch.chosen(x, subject.out_features, WEIGHT_FORMATS[subject.fmt], torch.bfloat16)
    if not config.block_m:
        return None
    return Loop(config.block_m, config.block_n, config.block_k or BLOCK, config.num_stages, config.descriptors)


def _tiles(subject: Subject, launch, loop: Loop | None) -> tuple[int, float]:
    """(pieces of work of the launch, how many of them were executed)."""
    counters = launch.counters
    if loop is None or not loop.persistent or not counters.macs:
        return math.prod(launch.grid), counters.blocks
    outputs = counters.tensors["y"] // (2 * subject.rows)  # of several launches, this one's
    tiles = cdiv(subject.rows, loop.rows) * cdiv(outputs, loop.outputs)
    of_one = loop.rows * loop.outputs * cdiv(subject.in_features, BLOCK) * BLOCK
    return tiles, sum(counters.macs.values()) / of_one


# Of accesses to shared memory, what the machine's and PTX's are called: ptxas joins some.
_SHARED = {"load": ("LDS", "ld.shared"), "store": ("STS", "st.shared")}


def _joined(kind: str, machine: Mapping[str, float], counters) -> float:
    """The share of PTX's accesses of the ``kind`` that is left in machine code; 1 of those that are not joined."""
    name, in_ptx = _SHARED.get(kind, ("", ""))
    wanted = counters.issued.get(in_ptx, 0)
    return min(1.0, machine.get(name, 0) / wanted) if wanted else 1.0


def _count(arch: int, subject: Subject, launch, machine: tuple[Mapping[str, float], int], loop: Loop | None) -> Count:
    """``machine``: instructions that were issued, by name, and registers of a thread."""
    from . import issued

    counters = launch.counters
    tiles, executed = _tiles(subject, launch, loop)
    scale = tiles / executed
    warps = launch.threads // 32
    instructions, registers = machine
    of_class = issued.by_class(instructions)
    left = {kind: scale * _joined(kind, instructions, counters) for kind in counters.passes}
    loops = loop is not None and bool(counters.macs)
    requests = {f"{kind} {tensor}": one for (kind, tensor), one in counters.requests.items()}
    of_a_warp = counters.blocks * warps
    return Count(
        arch,
        subject,
        launch.kernel,
        launch.grid,
        warps,
        tiles,
        counters.blocks,
        {name: round(scale * one.sectors) for name, one in requests.items()},
        {name: round(scale * one.least) for name, one in requests.items()},
        {name: round(scale * number) for name, number in counters.fetched.items()},
        {name: counters.tensors[name] for name in counters.fetched},
        {kind: round(left[kind] * one.passes) for kind, one in counters.passes.items()},
        {kind: round(left[kind] * one.least) for kind, one in counters.passes.items()},
        round(scale * counters.engines),
        {kind: round(scale * number) for kind, number in counters.macs.items()},
        {name: round(number / (executed * warps), 2) for name, number in sorted(of_class.items())},
        registers,
        launch.shared_bytes,
        cdiv(subject.in_features, loop.step) if loops else 1,
        loop.stages if loops else 1,
        {name: round(number / of_a_warp, 2) for name, number in sorted(counters.issued.items())},
        {f"{what}, {left}": round(number / of_a_warp, 2) for (what, left), number in sorted(counters.waits.items())},
    )


def count_subject(arch: int, subject: Subject) -> list[Count]:
    """Of each launch. The process compiles for the executor from now on."""
    from .executor import driver

    session = driver.Session(
        arch, shared_memory(arch), copies_need_fence=copies_need_fence(), counts=True, most_blocks=BLOCKS
    )
    with tempfile.TemporaryDirectory() as cache, standing_in(Device("counted", arch, GPUS[arch].multiprocessors)):
        driver.install(session, cache)
        compute(subject)
        loop = loop_of(subject)
    # A weight may have tens of megabytes, and what executed a launch holds more, in circles.
    stored.cache_clear()
    gc.collect()
    return [_count(arch, subject, launch, _machine(launch), loop) for launch in session.launches]


def _machine(launch) -> tuple[Mapping[str, float], int]:
    from . import issued
    from .executor import driver

    assembled = issued.assemble(launch.text)
    return issued.issued(assembled, driver.program_of(launch.text).kernel, launch.counters.entered), assembled.registers


def _begin() -> None:
    """Of a process that counts: once, since it sets aside whatever objects there are."""
    end_with_parent()
    prepare_process()


def check(architectures: Sequence[int]) -> None:
    """Raises ValueError for an architecture that is not counted."""
    for arch in architectures:
        if arch not in ARCHITECTURES:
            why = WITHOUT_TRITON.get(arch, "another of its family stands for it")
            raise ValueError(
                f"sm_{arch} is not counted: {why}; --arch takes {', '.join(f'sm_{a}' for a in ARCHITECTURES)}"
            )


def count(
    architectures: Sequence[int], subjects: Sequence[Subject], workers: int | None = None
) -> Iterator[list[Count]]:
    """Of each of ``subjects`` on each of ``architectures``, in this order, by ``workers`` processes (default: one a
    core).
    """
    environment = os.environ.pop("TRITON_INTERPRET", None)
    pairs = [(arch, subject) for arch in architectures for subject in subjects if subject.is_for(arch)]
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers or os.cpu_count() or 1, context, _begin) as pool:
            yield from pool.map(count_subject, *zip(*pairs, strict=True))
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that counts was ended from outside, "
            "by the system if memory is short: --match counts fewer products"
        ) from error
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment


HEADER = (
    f"{'':7} {'':38} {'kernel':26} {'grid':>11} {'sectors':>7} {'banks':>6} {'L2':>9} {'again':>6}  "
    f"{'bound':>22} {'of bf16':>7}  {'waits for all':16} over the limit"
)


def lines(counts: Sequence[Count]) -> list[str]:
    """For people, of the launches of one subject. Behind the last stands how the bounds of all compare with the bound
    of a 16-bit product of the same shape.
    """
    *before, last = counts
    subject = last.subject
    if not subject.fmt:
        return [_line(one, "") for one in counts]
    plain = plain_bound(subject.rows, subject.out_features, subject.in_features, GPUS[last.arch])
    ratio = sum(max(bounds(one).values()) for one in counts) / plain
    return [*(_line(one, "") for one in before), _line(last, f"{ratio:.2f}")]


def _short(kernel: str) -> str:
    """Without what C++ makes of a name, and what is in all of them."""
    rest = kernel.removeprefix("_ZN")
    while rest != kernel and (length := re.match(r"\d+", rest)):  # names one in another, each behind its length
        begin = length.end()
        kernel, rest = rest[begin : begin + int(length.group())], rest[begin + int(length.group()) :]
    return kernel.removesuffix("_kernel")


def _line(found, ratio):
    grid = "x".join(str(side) for side in found.grid if side > 1) or "1"
    idle = ", ".join(f"{count:g} {what.split(',')[0]}" for what, count in found.waits.items() if what.endswith(", 0"))
    term, bound = max(bounds(found).items(), key=lambda one: one[1])
    return (
        f"sm_{found.arch:<4} {found.subject.name:38} {_short(found.kernel):26} {grid:>11} "
        f"{found.sector_ratio:>7.2f} {found.pass_ratio:>6.2f} "
        f"{sum(found.fetched.values()) / 1e6:>6.1f} MB {found.fetched_again:>5.1f}x  "
        f"{bound:>6.1f} µs {term:13} {ratio:>7}  {idle or '-':16} "
        f"{'; '.join(found.over())}".rstrip()
    )


def record(counts: Sequence[Count]) -> dict:
    """All that was found, for a JSON file, with versions, commit and date."""
    import triton

    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "triton": triton.__version__,
        "torch": torch.__version__,
        "gpus": {f"sm_{arch}": asdict(gpu) for arch, gpu in GPUS.items()},
        "counts": [
            asdict(one) | {"subject": asdict(one.subject) | {"name": one.subject.name}, "bounds_us": bounds(one)}
            for one in counts
        ],
    }
