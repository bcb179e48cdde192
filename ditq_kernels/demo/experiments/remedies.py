"""Experiment e: smoothing folded into the layers before, and bits chosen by layer under a budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from torch import nn

from ...analysis.sensitivity import draw_losses, forms_of, output_losses, squared_errors
from ...layer.formats import SCHEMES
from ...model.budget import WEIGHTS
from ...model.calibration import DEFAULT_STEP
from ...model.conversion import quantize
from ...model.planning import plan
from ...model.smoothing import smooth
from .lab import CALIBRATION_SEED, Case, Lab, Protocol

PROTOCOL = Protocol()
STRENGTHS = (None, 0.25, 0.5, 0.75, 1.0)
SMOOTHED = (("w8a8", "nearest"), ("w8a8_static", "nearest"), ("w4a8_g128", "nearest"), ("w4a8_g128", "compensated"))
BUDGETS = (4.3, 4.5, 5.0, 6.0)
TRIAL = Protocol(pictures=10, steps=5)  # of the runs with one layer quantized
UNIFORM = ("w4a16_g128", "w4a16_g64", "w4a16_g32", "w8a16")
ROUNDINGS = ("nearest", "compensated")


def cases(lab: Lab) -> Iterator[Case]:
    """Smoothing at several strengths; uniform formats, and budgets spent by three kinds of errors."""
    yield from _smoothing(lab)
    yield from _budgets(lab)


def _smoothing(lab: Lab) -> Iterator[Case]:
    def case(scheme: str, rounding: str, strength: float | None) -> Case:
        def build() -> nn.Module:
            model, calibration = lab.copy(), lab.calibration(DEFAULT_STEP, moments=True)
            if strength is not None:
                calibration = smooth(model, calibration, strength)
            return quantize(model, scheme, calibration, rounding=rounding, progress=False)

        facts = dict(remedy="smoothing", scheme=scheme, rounding=rounding, strength=strength)
        return Case(facts, build, noise=False)  # smoothed weights do not stand for the original's

    for scheme, rounding in SMOOTHED:
        for strength in STRENGTHS:
            yield case(scheme, rounding, strength)


def _budgets(lab: Lab) -> Iterator[Case]:
    """Weights only: a budget is about their bits."""

    @cache
    def picture_errors() -> dict[str, dict[str, float]]:
        schemes = [s.name for w in WEIGHTS for s in SCHEMES.values() if s.weight.name == w and s.activation.bits == 16]
        forms = {name: form for name, form in forms_of(lab.model, schemes, {}).items() if name in lab.layers}

        def draw():
            return lab.draw(lab.model, TRIAL, CALIBRATION_SEED)

        losses = output_losses(lab.model, draw, forms, {}, TRIAL.steps // 2)
        return squared_errors(draw_losses(lab.model, draw, losses, forms, {}), forms)

    def budgeted(errors: str, budget: float):
        how: Mapping = {
            "weights": lambda: {},
            "outputs": lambda: dict(calibration=lab.calibration(DEFAULT_STEP, moments=True)),
            "pictures": lambda: dict(errors=picture_errors()),
        }[errors]()
        return plan(lab.model, "w4a16_g128", budget_bits=budget, **how)

    def case(rounding: str, make_plan, **facts) -> Case:
        def build() -> nn.Module:
            calibration = lab.calibration(DEFAULT_STEP, moments=True)
            return quantize(lab.copy(), make_plan(), calibration, rounding=rounding, progress=False)

        return Case(dict(remedy="budget", rounding=rounding, **facts), build)

    for rounding in ROUNDINGS:
        for scheme in UNIFORM:
            yield case(rounding, lambda scheme=scheme: plan(lab.model, scheme), uniform=scheme)
        for errors in ("weights", "outputs", "pictures"):
            for budget in BUDGETS:
                yield case(
                    rounding, lambda e=errors, b=budget: budgeted(e, b), uniform=None, errors=errors, budget=budget
                )
