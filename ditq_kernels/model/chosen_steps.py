"""Which steps of a sampling run a calibration observes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from torch import nn

from .observation import CallObserver, count_steps, observe_steps
from .steps import Steps

ALL_STEPS = "all"
Step = int | float  # an index, negative from the end, or a fraction of the run
StepChoice = Step | str | Sequence[Step]


@dataclass(frozen=True)
class ChosenSteps:
    """Attributes:
    indices: of the steps, from 0, in the order in which they were asked for; None: all of the run.
    steps: of the run, where they were counted.
    last_call: of the model, behind which the last of the steps ends; None where it is not known beforehand.
    """

    indices: tuple[int, ...] | None
    steps: int | None = None
    last_call: int | None = None


def several(step: StepChoice) -> tuple[Step, ...]:
    """The steps one by one; of "all", which is no step, only that word."""
    return (step,) if isinstance(step, (str, Real)) else tuple(step)


def check_steps(step: StepChoice) -> None:
    """Raise TypeError or ValueError unless ``step`` is one that a run may have, several different ones, or "all"."""
    if isinstance(step, str) and step == ALL_STEPS:
        return
    if isinstance(step, str) or not isinstance(step, (Real, Sequence)):
        raise TypeError(
            f'step must be an int (an index), a float (a fraction of the run), several, or "all", got {step!r}'
        )
    for one in several(step):
        if isinstance(one, bool) or not isinstance(one, Real):
            raise TypeError(
                f'step must be an int (an index), a float (a fraction of the run), several, or "all", got {one!r}'
            )
        if not isinstance(one, Integral) and not 0 <= one <= 1:
            raise ValueError(f"a step given as a fraction must lie in [0, 1], got {one}; an index is an int")
    if not several(step):
        raise ValueError("no step is given to calibrate on")


def step_index(step: Step, steps: int) -> int:
    """The step, from 0, of a run of ``steps`` that a fraction, an index, or an index from the end means.

    Raises:
        ValueError: if it is beyond the run.
    """
    if not isinstance(step, Integral):
        return min(math.floor(step * steps), steps - 1)
    if not -steps <= step < steps:
        raise ValueError(f"step {step} is beyond the run: it has {steps} steps")
    return int(step) % steps


def choose_steps(
    model: nn.Module, run: Callable[[], Any], step: StepChoice, calls_per_step: int | None, once: bool = False
) -> ChosenSteps:
    """The steps that ``step`` means, in which :func:`check_steps` finds nothing wrong; a fraction or an index from the
    end costs a pass that counts.

    Args:
        once: whether what is the same step in a short run counts once; it is an error else.

    Raises:
        ValueError: if one is beyond the run, or two of them are the same.
    """
    if step == ALL_STEPS:
        return ChosenSteps(None)
    asked = several(step)
    if all(isinstance(one, Integral) and one >= 0 for one in asked):
        indices, counted = tuple(map(int, asked)), None
        last_call = None if calls_per_step is None else (max(indices) + 1) * calls_per_step
    else:
        counted = count_steps(model, run, calls_per_step)
        check_called(model, counted)
        indices = tuple(step_index(one, counted.steps) for one in asked)
        last_call = counted.last_call(max(indices))
    if once:
        indices = tuple(dict.fromkeys(indices))
    for place, index in enumerate(indices):
        if index in indices[:place]:
            of = "" if counted is None else f" of a run of {counted.steps}"
            before = asked[indices.index(index)]
            raise ValueError(f"{before} and {asked[place]} are both step {index}{of}; give each step once")
    return ChosenSteps(indices, None if counted is None else counted.steps, last_call)


def observe_chosen(
    model: nn.Module,
    run: Callable[[], Any],
    chosen: ChosenSteps,
    observer: CallObserver,
    calls_per_step: int | None,
    layers: Mapping[str, nn.Module],
) -> Steps:
    """Show ``observer`` what ``layers`` are fed in the ``chosen`` steps; the steps and calls that there were.

    Raises:
        ValueError: if the run does not call the model, or a step is beyond it; and as ``observer`` does.
    """
    if chosen.indices is None:
        seen = observe_steps(model, run, range(sys.maxsize), observer, calls_per_step, layers=layers)
        check_called(model, seen)
        return seen
    wanted = sorted(chosen.indices)
    seen = observe_steps(model, run, wanted, observer, calls_per_step, chosen.last_call, layers)
    if seen.steps <= wanted[-1] or seen.calls < (chosen.last_call or 0):
        check_called(model, seen, whole=False)
        raise ValueError(f"step {wanted[-1]} is beyond the run: it called the model {seen.calls} times")
    return seen


def check_called(model: nn.Module, steps: Steps, whole: bool = True) -> None:
    """Raise ValueError unless the run called ``model``, and if it must be ``whole``, in whole steps."""
    if not steps.calls:
        raise ValueError(
            f"run() never called the {type(model).__name__} given; give the model that the pipeline itself holds"
        )
    if whole:
        steps.check_whole()
