"""Experiment b''', the default of compensated rounding: second moments from one step and from several of one run, over
50 steps, on pictures that calibrate nothing; beside it, what a static scheme makes of the step that gives ranges.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...model.chosen_steps import StepChoice
from ...model.conversion import quantize
from .calibration import SETS
from .lab import Case, Lab, Protocol

PROTOCOL = Protocol(pictures=20, steps=50)
SCHEMES = ("w4a8_g64", "w4a8_g128")
STATIC_SCHEME = "w4a8_g128_static"
BEFORE = 0.6  # the one step of the default that was
# The first of several is the one that ranges are of.
CHOICES: tuple[StepChoice, ...] = (BEFORE, (0.4, 0.8), (0.6, 0.8), (0.3, 0.6, 0.9), "all")
STATIC_CHOICES: tuple[StepChoice, ...] = (BEFORE, (0.4, 0.8), (0.6, 0.8), (0.6, 0.4, 0.8))


def facts_of(scheme: str, step: StepChoice, which: int) -> dict[str, object]:
    """As a record has them: JSON knows no tuples."""
    return dict(scheme=scheme, step=list(step) if isinstance(step, tuple) else step, set=which)


def cases(lab: Lab) -> Iterator[Case]:
    """Compensated weights, activations per token or static, from each choice of steps and three sets of pictures."""

    def case(scheme: str, step: StepChoice, which: int) -> Case:
        def build() -> nn.Module:
            calibration = lab.calibration(step, moments=True, which=which)
            return quantize(lab.copy(), scheme, calibration, rounding="compensated", progress=False)

        return Case(facts_of(scheme, step, which), build)

    for which in range(SETS):
        for step in CHOICES:
            for scheme in SCHEMES:
                yield case(scheme, step, which)
        for step in STATIC_CHOICES:
            yield case(STATIC_SCHEME, step, which)
