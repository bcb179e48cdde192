"""Experiment b'', the default: activation ranges and second moments from one and the same step, over 50 steps."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...model.conversion import quantize
from .lab import Case, Lab, Protocol

SCHEME = "w4a8_g128_static"
PROTOCOL = Protocol(pictures=20, steps=50, calibration_pictures=10)
POSITIONS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SETS = 2


def cases(lab: Lab) -> Iterator[Case]:
    """Static activations and compensated weights from each position."""

    def case(step: float, which: int) -> Case:
        def build() -> nn.Module:
            calibration = lab.calibration(step, moments=True, which=which)
            return quantize(lab.copy(), SCHEME, calibration, rounding="compensated", progress=False)

        return Case(dict(scheme=SCHEME, step=step, set=which), build)

    for which in range(SETS):
        for step in POSITIONS:
            yield case(step, which)
