"""Experiment d': static activations with the ranges behind activation functions found at run time, and smoothed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ...model.calibration import DEFAULT_STEP
from ...model.conversion import quantize
from ...model.smoothing import smooth
from .calibration import SETS
from .lab import Case, Lab, Protocol

PROTOCOL = Protocol()
SCHEMES = ("w8a8_static", "w8a8_semistatic")
STRENGTHS = (None, 0.25)


def cases(lab: Lab) -> Iterator[Case]:
    """Both schemes, smoothed and not, each from three sets of calibration pictures; and every range at run time."""

    def case(scheme: str, strength: float | None, which: int | None) -> Case:
        def build() -> nn.Module:
            model = lab.copy()
            if which is None:
                return quantize(model, scheme, progress=False)
            calibration = lab.calibration(DEFAULT_STEP, moments=True, which=which)
            if strength is not None:
                calibration = smooth(model, calibration, strength)
            return quantize(model, scheme, calibration, progress=False)

        return Case(dict(scheme=scheme, strength=strength, set=which), build, noise=False)

    for which in range(SETS):
        for scheme in SCHEMES:
            for strength in STRENGTHS:
                yield case(scheme, strength, which)
    yield case("w8a8", None, None)
