"""Experiment a: from which steps static activation ranges are taken."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...model.conversion import quantize
from .lab import Case, Lab, Protocol

PROTOCOL = Protocol(calibration_pictures=10)
POSITIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SETS = 3
PERCENTILES = (99.9, 99.99)


def cases(lab: Lab) -> Iterator[Case]:
    """Dynamic ranges; one step at each position and all steps, three sets of calibration pictures; percentiles."""

    def static(step: float | str, which: int = 0, percentile: float | None = None) -> Case:
        def build() -> nn.Module:
            calibration = lab.calibration(step, which=which, percentile=percentile)
            return quantize(lab.copy(), "w8a8_static", calibration, progress=False)

        steps = lab.protocol.steps
        # A fraction costs one pass to count the steps.
        passes = steps if step == "all" else min(int(step * steps), steps - 1) + 2
        facts = dict(ranges="static", step=step, set=which, percentile=percentile, passes=passes)
        return Case(facts, build)

    dynamic = dict(ranges="dynamic", step=None, set=None, percentile=None, passes=0)
    yield Case(dynamic, lambda: quantize(lab.copy(), "w8a8", progress=False))
    for which in range(SETS):
        for step in (*POSITIONS, "all"):
            yield static(step, which)
    for percentile in PERCENTILES:
        for step in (0.5, "all"):
            for which in range(SETS):
                yield static(step, which, percentile)
