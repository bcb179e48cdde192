"""Experiment b': from which steps, runs and how many pictures the second moments of compensated rounding are taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from .calibration import POSITIONS, SETS
from .lab import Case, Lab, Protocol
from .simulated import WeightRounding

PROTOCOL = Protocol(calibration_pictures=10)
NEAREST = WeightRounding(4, 128, "eighth_level", two_level=True)
COMPENSATED = replace(NEAREST, compensated=True)
PICTURES = (1, 2, 5, 20, 50)  # 10 are among the positions


def cases(lab: Lab) -> Iterator[Case]:
    """4-bit weights in groups of 128 to nearest; compensated from one step at each position, from all, from the same
    step of three runs, and from 1 to 50 pictures.
    """

    def compensated(step: float | str, sets: Sequence[int], pictures: int) -> Case:
        def weight_of(name: str, weight: torch.Tensor) -> torch.Tensor:
            calibrations = [lab.calibration(step, moments=True, which=which, pictures=pictures) for which in sets]
            return COMPENSATED.apply(weight, sum(calibration.moments[name] for calibration in calibrations))

        def build() -> nn.Module:
            return lab.with_weights(weight_of)

        return Case(dict(rounding="compensated", step=step, sets=list(sets), pictures=pictures), build)

    nearest = dict(rounding="nearest", step=None, sets=None, pictures=None)
    yield Case(nearest, lambda: lab.with_weights(lambda _, weight: NEAREST.apply(weight)))
    few = lab.protocol.calibration_pictures
    for which in range(SETS):
        for step in (*POSITIONS, "all"):
            yield compensated(step, [which], few)
    for step in (0.5, 0.8, "all"):
        yield compensated(step, list(range(SETS)), few)
    for pictures in PICTURES:
        for which in range(SETS):
            yield compensated(0.5, [which], pictures)
