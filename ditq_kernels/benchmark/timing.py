"""How a duration is measured, so that it can be compared.

- A contender's calls walk over several copies of everything they read, and write as many results, together a multiple
  of the L2 cache: what a call touches was last touched so long ago that it has to come from memory, and go there.
- They are captured once in a CUDA graph: a replay has no launch overhead of Python's. What cannot be captured is
  launched call by call, and its timing says "events".
- Contenders take turns, round by round, each round in another order: a GPU that changes its clock does so to all.
- Each timed replay directly follows an untimed one of the same contender: the GPU is busy while the host enqueues, so
  that the events see the calls and not the host.
- Beside it stands what a call takes that a program makes itself, launched one after the other until the GPU is done:
  the host's time where that is the longer one.
- The figure is the median over rounds; the quartiles say how far to trust it. Clocks are left as they are.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

L2_MULTIPLE = 3  # bytes that a rotation reads and writes, in L2 caches
MOST_SETS = 512
REPLAY_SECONDS = 1e-3  # a replay takes about this long, so that the events' resolution does not show
MOST_CALLS = 512
CALLS_BY_HOST = 64  # at least, one after the other, so that waiting for the last one does not count
GRAPH, EVENTS = "graph", "events"  # how calls were launched
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
        how: :data:`GRAPH` or :data:`EVENTS`.
        eager: median microseconds of a call that the host makes; None where nobody asked.
    """

    microseconds: float
    lower: float
    upper: float
    rounds: int
    calls: int
    sets: int
    how: str
    eager: float | None = None

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

    def seconds_of_host(self, run: Callable[[], None]) -> float:
        """From the begin of ``run`` until the device has done what it asked for."""


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
            return run, EVENTS
        return graph.replay, GRAPH

    def seconds(self, run: Callable[[], None]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) * 1e-3

    def seconds_of_host(self, run: Callable[[], None]) -> float:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

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
    """A contender ready to be timed: ``replay`` carries out ``calls`` calls over ``sets`` copies of its operands, and
    ``launch``, as a program would, ``launched`` of them.

    ``operands`` are those copies: a graph knows addresses only, and memory given back would be written by others.
    """

    replay: Callable[[], None]
    how: str
    calls: int
    sets: int
    operands: Sequence[tuple[Any, ...]] = ()
    launch: Callable[[], None] | None = None
    launched: int = 0


def copies_needed(moved_bytes: int, l2_bytes: int) -> int:
    """Copies of what a call reads and writes, ``moved_bytes``, that together are :data:`L2_MULTIPLE` caches; at least
    2.
    """
    return min(MOST_SETS, max(2, math.ceil(L2_MULTIPLE * l2_bytes / max(1, moved_bytes))))


def copy_operand(operand: Any) -> Any:
    """Another one of the same values elsewhere in memory: of a tensor with its strides, of a module with all its
    tensors; None of None.
    """
    if type(operand) in (torch.Tensor, torch.nn.Parameter):
        return operand.detach().clone(memory_format=torch.preserve_format)
    return copy.deepcopy(operand)


def rotation(operands: Sequence[Any], moved_bytes: int, l2_bytes: int) -> list[tuple[Any, ...]]:
    """``operands`` and as many copies of them as leave the cache cold, where one call reads and writes
    ``moved_bytes``.
    """
    copies = copies_needed(moved_bytes, l2_bytes)
    return [tuple(operands)] + [tuple(map(copy_operand, operands)) for _ in range(copies - 1)]


def record(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]], stopwatch: Stopwatch) -> Recording:
    """Warm ``call(*operands)`` up, and make it ready to be timed over the operands in ``sets``, all of them equally
    often.
    """

    def walk(rounds: int) -> None:
        results: list[Any] = [None] * len(sets)  # kept for a round, so that each set's are written elsewhere
        for _ in range(rounds):
            for index, operands in enumerate(sets):
                results[index] = call(*operands)

    call(*sets[0])  # compiles
    replay, how = stopwatch.record(lambda: walk(1))
    # One round, with no launch overhead of Python's in it, says how many a replay needs.
    rounds = min(MOST_CALLS // len(sets), math.ceil(REPLAY_SECONDS / max(stopwatch.seconds(replay), 1e-7)))
    if rounds > 1:
        replay, how = stopwatch.record(lambda: walk(rounds))
    by_host = math.ceil(CALLS_BY_HOST / len(sets))
    launched = by_host * len(sets)
    return Recording(replay, how, max(1, rounds) * len(sets), len(sets), sets, lambda: walk(by_host), launched)


def interleave(
    recordings: Mapping[str, Recording], stopwatch: Stopwatch, rounds: int = ROUNDS, eager: bool = False
) -> dict[str, Timing | Exception]:
    """Time all ``recordings`` in turns. One that fails on the way yields its exception, the others go on.

    Args:
        eager: time the calls that the host makes, too.

    Raises:
        DeviceLost: if the device fails for good.
    """
    samples: dict[str, list[float]] = {name: [] for name in recordings}
    by_host: dict[str, list[float]] = {name: [] for name in recordings}
    failures: dict[str, Exception] = {}
    names = list(recordings)
    for turn in range(rounds):
        start = turn % max(1, len(names))
        for name in names[start:] + names[:start]:
            if name in failures:
                continue
            try:
                one = recordings[name]
                samples[name].append(1e6 * stopwatch.seconds(one.replay) / one.calls)
                if eager and one.launch is not None:
                    by_host[name].append(1e6 * stopwatch.seconds_of_host(one.launch) / one.launched)
            except DeviceLost:
                raise
            except Exception as error:
                failures[name] = error
                if isinstance(stopwatch, CudaStopwatch):
                    stopwatch.assert_alive()
    return {name: failures.get(name) or summarise(samples[name], recordings[name], by_host[name]) for name in names}


def summarise(microseconds: Sequence[float], recording: Recording, eager: Sequence[float] = ()) -> Timing:
    """Median and quartiles of the samples, and the median of the host's."""
    lower, median, upper = (
        statistics.quantiles(microseconds, n=4, method="inclusive")
        if len(microseconds) > 1
        else (microseconds[0], microseconds[0], microseconds[0])
    )
    of_host = statistics.median(eager) if eager else None
    return Timing(median, lower, upper, len(microseconds), recording.calls, recording.sets, recording.how, of_host)
