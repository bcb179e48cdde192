"""Which step of a sampling run a call of the model belongs to."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .wrappers import bare

TIME = (
    "timestep",
    "timesteps",
    "time",
    "t",
    "sigma",
)  # what models call the time of a step, in diffusers and elsewhere


class Steps:
    """Counts calls of ``model`` and steps of the run that makes them.

    Calls in a row that are given the same time are one step: some pipelines do guidance in a second call, and may do so
    for part of the run only. Where ``calls_per_step`` is given, so many calls are one; where there is no time, each is.
    """

    def __init__(self, model: nn.Module, calls_per_step: int | None = None) -> None:
        self.calls = 0
        self.steps = 0
        self.most_calls = 0  # of one step
        self.begins: list[int] = []  # the first call of each step
        self._calls_per_step = calls_per_step
        names = list(inspect.signature(bare(model).forward).parameters)
        self._name = next((name for name in TIME if name in names), None)
        self._place = names.index(self._name) if self._name else 0
        self._time: list[float] | None = None
        self._in_step = 0

    def begin_call(self, args: tuple, kwargs: dict[str, Any]) -> int:
        """The step, from 0, of a call with these arguments, which begins."""
        if self._begins_step(args, kwargs):
            self.steps += 1
            self.begins.append(self.calls)
            self._in_step = 0
        self.calls += 1
        self._in_step += 1
        self.most_calls = max(self.most_calls, self._in_step)
        return self.steps - 1

    def _begins_step(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        if self._calls_per_step is not None:
            return self.calls % self._calls_per_step == 0
        value = kwargs.get(self._name, args[self._place] if self._name and self._place < len(args) else None)
        before, self._time = self._time, None if value is None else torch.as_tensor(value).flatten().tolist()
        return self._time is None or self._time != before

    def last_call(self, step: int) -> int:
        """How many calls there have been when ``step``, from 0, has ended."""
        return [*self.begins, self.calls][step + 1]

    def check_whole(self) -> None:
        """Raise ValueError if the run has ended in the middle of a step."""
        if self._calls_per_step is not None and self.calls % self._calls_per_step:
            raise ValueError(
                f"the run called the model {self.calls} times, which is no multiple of calls_per_step = "
                f"{self._calls_per_step}"
            )
