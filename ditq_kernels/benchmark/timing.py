"""How a duration is measured, so that it can be compared.

- A contender's calls walk over several copies of everything they read, together a multiple of the L2 cache: what a call
  reads was last touched so long ago that it has to come from memory.
- They are captured once in a CUDA graph: a replay has no launch overhead of Python's. What cannot be captured is
  launched call by call, and its timing says "events".
- Contenders take turns, round by round, each round in another order: a GPU that changes its clock does so to all.
- Each timed replay directly follows an untimed one of the same contender: the GPU is busy while the host enqueues, so
  that the events see the calls and not the host.
- The figure is the median over rounds; the quartiles say how far to trust it. Clocks are left as they are.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

L2_MULTIPLE = 3  # bytes that a rotation reads, in L2 caches
MOST_SETS = 192
REPLAY_SECONDS = 1e-3  # a replay takes about this long, so that the events' resolution does not show
MOST_CALLS = 256
ROUNDS = 15


class DeviceLost(RuntimeError):
    """The GPU's context is unusable after an error: nothing more can run in this process."""


@dataclass(frozen=True)
class Timing:
    """Duration of one call.

    Attributes:
        microseconds: median over rounds.
        lower, upper: first and third quartile, in microseconds.
        rounds: how many replays were timed.
        calls: calls in a replay.
        sets: copies of the operands that they walk over.
        how: "graph" or "events".
    """

    microseconds: float
    lower: float
    upper: float
    rounds: int
    calls: int
    sets: int
    how: str

    def beats(self, other: Timing) -> bool:
        """Whether it is faster by more than the spread of the two."""
        return self.upper < other.lower


class Stopwatch(Protocol):
    """What a measurement needs of a device; tests put another in a GPU's place."""

    l2_bytes: int

    def record(self, run: Callable[[], None]) -> tuple[Callable[[], None], str]:
        """(replay, how) of ``run``, which has run before."""

    def seconds(self, run: Callable[[], None]) -> float:
        """Duration of ``run`` on the device."""


class CudaStopwatch:
    """The real one, for the CUDA device ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size

    def record(self, run: Callable[[], None]) -> tuple[Callable[[], None], str]:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            run()  # allocations and handles of a fresh stream stay outside the graph
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                run()
            graph.replay()
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            self.assert_alive()
            return run, "events"
        return graph.replay, "graph"

    def seconds(self, run: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) * 1e-3

    def assert_alive(self) -> None:
        """
        Raises:
            DeviceLost: if the context no longer works.
        """
        try:
            torch.cuda.synchronize(self.device)
            torch.zeros(1, device=self.device).item()
        except RuntimeError as error:
            raise DeviceLost(" ".join(str(error).split())) from error


@dataclass(frozen=True)
class Recording:
    """A contender ready to be timed: ``replay`` carries out ``calls`` calls over ``sets`` copies of its operands."""

    replay: Callable[[], None]
    how: str
    calls: int
    sets: int


def copies_needed(set_bytes: int, l2_bytes: int) -> int:
    """Copies of operands of ``set_bytes`` that together are :data:`L2_MULTIPLE` caches; at least 2."""
    return min(MOST_SETS, max(2, math.ceil(L2_MULTIPLE * l2_bytes / max(1, set_bytes))))


def copy_operand(operand: Any) -> Any:
    """Another one of the same values elsewhere in memory: of a tensor with its strides, of a module with all its
    tensors; None of None.
    """
    if type(operand) in (torch.Tensor, torch.nn.Parameter):
        return operand.detach().clone(memory_format=torch.preserve_format)
    return copy.deepcopy(operand)


def record(
    call: Callable[..., Any],
    operands: Sequence[Any],
    set_bytes: int,
    stopwatch: Stopwatch,
    copies: int | None = None,
) -> Recording:
    """Warm ``call(*operands)`` up, and make it ready to be timed over copies of the operands.

    Args:
        set_bytes: what one call reads of the operands.
        copies: of the operands; by default as many as leave the cache cold.
    """
    call(*operands)  # compiles
    copies = copies or copies_needed(set_bytes, stopwatch.l2_bytes)
    sets = [tuple(operands)] + [tuple(map(copy_operand, operands)) for _ in range(copies - 1)]

    def walk(calls: int) -> None:
        for index in range(calls):
            call(*sets[index % copies])

    each = stopwatch.seconds(lambda: walk(copies)) / copies
    calls = max(copies, min(MOST_CALLS, math.ceil(REPLAY_SECONDS / max(each, 1e-7))))
    replay, how = stopwatch.record(lambda: walk(calls))
    return Recording(replay, how, calls, copies)


def interleave(
    recordings: Mapping[str, Recording], stopwatch: Stopwatch, rounds: int = ROUNDS
) -> dict[str, Timing | Exception]:
    """Time all ``recordings`` in turns. One that fails on the way yields its exception, the others go on.

    Raises:
        DeviceLost: if the device fails for good.
    """
    samples: dict[str, list[float]] = {name: [] for name in recordings}
    failures: dict[str, Exception] = {}
    names = list(recordings)
    for turn in range(rounds):
        start = turn % max(1, len(names))
        for name in names[start:] + names[:start]:
            if name in failures:
                continue
            try:
                samples[name].append(1e6 * stopwatch.seconds(recordings[name].replay) / recordings[name].calls)
            except DeviceLost:
                raise
            except Exception as error:
                failures[name] = error
                if isinstance(stopwatch, CudaStopwatch):
                    stopwatch.assert_alive()
    return {name: failures.get(name) or summarise(samples[name], recordings[name]) for name in names}


def summarise(microseconds: Sequence[float], recording: Recording) -> Timing:
    """Median and quartiles of the samples."""
    lower, median, upper = (
        statistics.quantiles(microseconds, n=4, method="inclusive")
        if len(microseconds) > 1
        else (microseconds[0], microseconds[0], microseconds[0])
    )
    return Timing(median, lower, upper, len(microseconds), recording.calls, recording.sets, recording.how)
